"use strict";
// The page of scores: a table that sorts and filters, curves over each other, the details of a run.
// Everything in `data` is text from run folders: it is only ever set as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function put(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
const make = (tag, attributes = {}, ...children) =>
  put(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function number(value) {
  if (value == null) return "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return String(value);
  return size >= 1e-3 && size < 1e5 ? value.toFixed(4) : value.toExponential(2);
}

// The table

const runs = data.runs;
const chosen = new Map(); // run -> its place among the colours
const sorted = {column: data.columns[0], down: false};

function choose(run, yes) {
  if (!yes) chosen.delete(run);
  else if (!chosen.has(run)) {
    const taken = new Set(chosen.values());
    let slot = 0;
    while (taken.has(slot)) slot++;
    chosen.set(run, slot);
  }
}
const colour = (slot) => "c" + (slot % 8);
const stroke = (slot) => ["", " dash", " dot"][Math.floor(slot / 8) % 3];

for (const run of runs) {
  run.box = make("input", {
    type: "checkbox",
    "aria-label": "curve of " + run.name,
    change: (event) => {
      choose(run, event.target.checked);
      draw();
    },
  });
  run.cellOfBox = make("td", {class: "pick"}, make("label", {}, run.box));
  const cells = data.columns.map((column, i) => {
    const text = run.cells[i].text;
    if (column.key === "run") {
      const open = make(
        "button",
        {class: "open name", type: "button", "aria-haspopup": "dialog", click: () => show(run)},
        text,
      );
      return make("td", {class: column.key}, open);
    }
    const kind = column.number ? "number" : "cut";
    const kinds = [column.key, kind, column.main ? "main" : ""].join(" ");
    return make("td", {class: kinds, title: text.length > 28 ? text : null}, text);
  });
  run.row = make("tr", {}, run.cellOfBox, ...cells);
}

function compare(a, b, column, down) {
  const i = data.columns.indexOf(column);
  const x = a.cells[i].value;
  const y = b.cells[i].value;
  // what is missing comes last in both directions
  if (x == null || y == null) return (x == null) - (y == null);
  const order =
    typeof x === "number" && typeof y === "number"
      ? x - y
      : String(x).localeCompare(String(y), "en", {numeric: true});
  return down ? -order : order;
}

function arrange() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = runs.filter((run) => words.every((word) => run.search.includes(word)));
  shown.sort((a, b) => compare(a, b, sorted.column, sorted.down) || a.place - b.place);
  $("rows").replaceChildren(...shown.map((run) => run.row));
  $("nothing").hidden = shown.length > 0;
  $("count").textContent = words.length
    ? `${shown.length} of ${runs.length} runs`
    : `${runs.length} run${runs.length === 1 ? "" : "s"}`;
  return shown;
}

const heads = data.columns.map((column) => {
  const arrow = make("span", {class: "arrow", "aria-hidden": "true"});
  // a narrow screen breaks a label after _ and .
  const words = column.label.split(/(?<=[_.])/).flatMap((word) => [word, make("wbr")]);
  const button = make(
    "button",
    {type: "button", title: "sort by " + column.label},
    ...(column.number ? [arrow, ...words] : [...words, arrow]),
  );
  const head = make(
    "th",
    {
      scope: "col",
      class: [column.key, column.number ? "number" : "", column.main ? "main" : ""].join(" "),
    },
    button,
  );
  button.addEventListener("click", () => {
    const again = sorted.column === column;
    sorted.down = again ? !sorted.down : Boolean(column.down);
    sorted.column = column;
    mark();
    arrange();
  });
  return {column, head, arrow};
});
function mark() {
  for (const {column, head, arrow} of heads) {
    const on = column === sorted.column;
    if (on) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    arrow.textContent = on ? (sorted.down ? "▼" : "▲") : "";
  }
}
$("head").append(
  make("th", {class: "pick", scope: "col"}, make("span", {class: "muted", "aria-label": "curve"})),
  ...heads.map((head) => head.head),
);

// The curves

const quantities = data.quantities;
const select = $("quantity");
for (const name of quantities) select.append(make("option", {value: name}, name));
if (quantities.includes(data.metric)) select.value = data.metric;

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  const found = [];
  const many = Math.log10(high / low) < 3;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of many ? [1, 2, 5] : [1]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(Number(tick.toPrecision(6)));
    }
  return found.length > 1 ? found : ticks(low, high, 4);
}
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

let view = null; // what the pointer needs to know of the picture
let at = null; // the epoch that is pointed to

function draw() {
  for (const run of runs) {
    const slot = chosen.get(run);
    run.box.checked = slot !== undefined;
    run.cellOfBox.className = "pick" + (slot === undefined ? "" : " " + colour(slot));
  }
  const quantity = select.value;
  const log = $("log").checked;
  const curves = [...chosen].map(([run, slot]) => {
    return {run, slot, points: pointsOf(run, quantity, log)};
  });
  const there = curves.flatMap((curve) => curve.points.filter((point) => point[1] !== null));
  legend(curves);
  hide();
  $("log").disabled = !there.length && !log;
  const missing = there.length ? "" : whyBlank(quantity, log);
  $("blank").textContent = missing;
  $("blank").hidden = !missing;
  $("picture").replaceChildren();
  view = null;
  if (!there.length) return;
  const frame = frameOf(there, log);
  const picture = emptyPicture(frame, quantity, log, curves.length);
  picture.append(linesOf(curves, frame));
  const marks = svg("g", {"clip-path": "url(#inside)"});
  picture.append(marks);
  view = {...frame, curves, marks, quantity};
  listen(picture);
  $("picture").append(picture);
}

function pointsOf(run, quantity, log) {
  const values = run.curves.values[quantity] || [];
  return run.curves.epochs.map((epoch, i) => {
    const value = values[i] ?? null;
    return [epoch, log && value <= 0 ? null : value];
  });
}

function whyBlank(quantity, log) {
  if (!runs.length) return "";
  if (!chosen.size) return "Choose runs in the table to see their curves.";
  return `The chosen runs have no ${log ? "positive " : ""}${quantity || "history"}.`;
}

// The size of the picture, and the functions that place an epoch and a value in it.
function frameOf(there, log) {
  const width = Math.max(240, $("picture").clientWidth);
  const height = Math.round(Math.max(230, Math.min(340, width * 0.42)));
  const xs = [...new Set(there.map((point) => point[0]))].sort((a, b) => a - b);
  let [left, right] = [xs[0], xs[xs.length - 1]];
  if (left === right) [left, right] = [left - 0.5, right + 0.5];
  const from = $("close-up").checked ? left + (right - left) / 3 : left;
  const late = there.filter((point) => point[0] >= from);
  const [low, high] = withRoom(late.length ? late : there, log);
  const yTicks = log ? logTicks(low, high) : ticks(low, high, 6);
  const room = Math.max(2, Math.floor(width / 60));
  const xTicks = ticks(left, right, Math.min(xs.length, room)).filter(Number.isInteger);
  const longest = Math.max(...yTicks.map((tick) => short(tick).length));
  const margin = {top: 26, right: 14, bottom: 40, left: 14 + 7.2 * longest};
  const scale = log ? Math.log : (value) => value;
  const inner = {
    width: width - margin.left - margin.right,
    height: height - margin.top - margin.bottom,
  };
  const share = (value) => (scale(value) - scale(low)) / (scale(high) - scale(low));
  const bottom = height - margin.bottom;
  const x = (epoch) => margin.left + ((epoch - left) / (right - left)) * inner.width;
  const y = (value) => bottom - share(value) * inner.height;
  return {width, height, margin, inner, bottom, xs, x, y, yTicks, xTicks};
}

// The lowest and the highest value that the picture has room for.
function withRoom(points, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const [, y] of points) {
    low = Math.min(low, y);
    high = Math.max(high, y);
  }
  if (log) {
    const pad = low === high ? 2 : (high / low) ** 0.04;
    return [low / pad, high * pad];
  }
  const pad = low === high ? Math.abs(low) * 0.05 || 1 : (high - low) * 0.05;
  return [low - pad, high + pad];
}

// The picture with its axes and no curves.
function emptyPicture(frame, quantity, log, count) {
  const {width, height, margin, inner, bottom, x, y} = frame;
  const end = width - margin.right;
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    tabindex: "0",
    "aria-label": `${quantity} over epochs, chosen runs: ${count}; arrow keys read the values`,
  });
  for (const tick of frame.yTicks)
    picture.append(
      svg("line", {class: "grid", x1: margin.left, x2: end, y1: y(tick), y2: y(tick)}),
      svg("text", {x: margin.left - 8, y: y(tick) + 4, "text-anchor": "end"}, short(tick)),
    );
  picture.append(svg("line", {class: "axis", x1: margin.left, x2: end, y1: bottom, y2: bottom}));
  for (const tick of frame.xTicks)
    picture.append(
      svg("line", {class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4}),
      svg("text", {x: x(tick), y: bottom + 18, "text-anchor": "middle"}, short(tick)),
    );
  const unit = /(^|_)seconds$/.test(quantity) ? " (s)" : "";
  const inside = {
    x: margin.left - 6,
    y: margin.top - 6,
    width: inner.width + 12,
    height: inner.height + 8,
  };
  picture.append(
    svg("text", {x: margin.left + inner.width / 2, class: "label", y: height - 5}, "epoch"),
    svg("text", {x: 0, y: 13}, quantity + unit + (log ? ", logarithmic" : "")),
    svg("clipPath", {id: "inside"}, svg("rect", inside)),
  );
  return picture;
}

function linesOf(curves, frame) {
  const lines = svg("g", {"clip-path": "url(#inside)"});
  for (const curve of curves) {
    curve.lines = lineOf(curve, frame);
    lines.append(curve.lines);
  }
  return lines;
}

// One curve: a path that pauses where a value is missing, and a dot for a value that stands alone.
function lineOf(curve, {x, y}) {
  const group = svg("g", {class: colour(curve.slot)});
  const line = curve.points.filter((point) => point[0] !== null);
  let path = "";
  let before = false;
  line.forEach(([epoch, value], i) => {
    if (value !== null) {
      path += `${before ? "L" : "M"}${x(epoch).toFixed(1)} ${y(value).toFixed(1)}`;
      const next = line[i + 1];
      if (!before && !(next && next[1] !== null))
        group.append(svg("circle", {class: "point", cx: x(epoch), cy: y(value), r: 4}));
    }
    before = value !== null;
  });
  group.prepend(svg("path", {class: "curve" + stroke(curve.slot), d: path}));
  return group;
}

function listen(picture) {
  picture.addEventListener("pointermove", (event) => point(nearest(event)));
  picture.addEventListener("pointerdown", (event) => point(nearest(event)));
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") hide();
  });
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const {xs} = view;
    const i = xs.indexOf(at);
    const last = xs.length - 1;
    const to = {ArrowLeft: i < 0 ? last : i - 1, ArrowRight: i + 1, Home: 0, End: last}[event.key];
    if (event.key === "Escape") hide();
    else if (to !== undefined) {
      event.preventDefault();
      point(xs[Math.max(0, Math.min(last, to))]);
    }
  });
}

function nearest(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const place = ((event.clientX - box.left) / box.width) * view.width;
  return view.xs.reduce((best, x) =>
    Math.abs(view.x(x) - place) < Math.abs(view.x(best) - place) ? x : best,
  );
}
function hide() {
  at = null;
  $("tip").hidden = true;
  if (view) view.marks.replaceChildren();
}
function point(epoch) {
  if (at === epoch) return;
  at = epoch;
  const values = view.curves
    .map((curve) => ({
      ...curve,
      value: (curve.points.find((point) => point[0] === epoch) || [])[1],
    }))
    .filter((curve) => curve.value != null);
  values.sort((a, b) => b.value - a.value);
  view.marks.replaceChildren(
    svg("line", {
      class: "cross",
      x1: view.x(epoch),
      x2: view.x(epoch),
      y1: view.margin.top,
      y2: view.bottom,
    }),
    ...values.map((curve) =>
      svg("circle", {
        class: "point " + colour(curve.slot),
        cx: view.x(epoch),
        cy: view.y(curve.value),
        r: 4.5,
      }),
    ),
  );
  const rows = values.map((curve) =>
    make(
      "tr",
      {},
      make("td", {}, make("span", {class: `swatch ${colour(curve.slot)}${stroke(curve.slot)}`})),
      make("td", {class: "name"}, curve.run.name),
      make("td", {}, number(curve.value)),
    ),
  );
  const tip = $("tip");
  tip.replaceChildren(
    make("div", {class: "muted"}, `epoch ${epoch}, ${view.quantity}`),
    make("table", {}, ...rows),
  );
  tip.hidden = false;
  const space = $("chart").clientWidth;
  const right = view.x(epoch) > view.width / 2;
  const place = 16 + (view.x(epoch) / view.width) * (space - 32);
  const wished = right ? place - tip.offsetWidth - 14 : place + 14;
  tip.style.left = `${Math.max(8, Math.min(space - tip.offsetWidth - 8, wished))}px`;
}

function legend(curves) {
  const emphasise = (one) => {
    for (const curve of curves)
      if (curve.lines) curve.lines.classList.toggle("faint", one !== null && curve !== one);
  };
  $("legend").replaceChildren(
    ...curves.map((curve) =>
      make(
        "li",
        {},
        make(
          "button",
          {
            type: "button",
            "aria-haspopup": "dialog",
            click: () => show(curve.run),
            pointerenter: () => emphasise(curve),
            pointerleave: () => emphasise(null),
            focus: () => emphasise(curve),
            blur: () => emphasise(null),
          },
          make("span", {class: `swatch ${colour(curve.slot)}${stroke(curve.slot)}`}),
          make("span", {class: "name"}, curve.run.name),
        ),
      ),
    ),
  );
}

// The details of a run

function copyButton(text, place) {
  const button = make(
    "button",
    {
      class: "button",
      type: "button",
      click: async () => {
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(place);
          button.textContent = "Selected";
        }
        setTimeout(() => {
          button.textContent = "Copy";
        }, 1500);
      },
    },
    "Copy",
  );
  return button;
}
const parts = {
  commands: (part) =>
    make(
      "div",
      {},
      ...part.items.map((item) => {
        if (!item.words.length) return make("p", {class: "muted"}, item.label);
        const code = make(
          "code",
          {},
          ...item.words.flatMap((word, i) => [i ? " " : "", make("span", {class: "word"}, word)]),
        );
        return make(
          "div",
          {class: "command"},
          make("p", {}, item.label),
          make("pre", {}, code),
          copyButton(item.words.join(" "), code),
        );
      }),
    ),
  facts: (part) =>
    make(
      "table",
      {class: "facts"},
      make(
        "tbody",
        {},
        ...part.rows.map(([name, value, marked]) =>
          make(
            "tr",
            {class: marked ? "mark" : null},
            make("th", {scope: "row", class: "name"}, name),
            make("td", {class: "name"}, value),
          ),
        ),
      ),
    ),
  table: (part) =>
    make(
      "table",
      {class: "facts"},
      make(
        "thead",
        {},
        make("tr", {}, ...part.head.map((name) => make("th", {scope: "col"}, name))),
      ),
      make(
        "tbody",
        {},
        ...part.rows.map((row) =>
          make("tr", {}, ...row.map((cell) => make("td", {class: "name"}, cell))),
        ),
      ),
    ),
  text: (part) =>
    make(
      "details",
      {},
      make("summary", {}, part.label),
      make("pre", {tabindex: "0"}, make("code", {}, part.text)),
    ),
};
function show(run) {
  $("title").textContent = run.name;
  $("body").replaceChildren(
    ...run.details.flatMap((section) => [
      make("h3", {}, section.title),
      ...section.parts.map((part) => parts[part.kind](part)),
    ]),
  );
  $("run").showModal();
  $("run").scrollTop = 0;
  $("title").focus();
}
$("close").addEventListener("click", () => $("run").close());
$("run").addEventListener("click", (event) => {
  if (event.target === $("run")) $("run").close();
});

// Begin

$("filter").addEventListener("input", arrange);
select.addEventListener("change", draw);
for (const id of ["log", "close-up"]) $(id).addEventListener("change", draw);
$("all").addEventListener("click", () => {
  for (const run of arrange()) choose(run, true);
  draw();
});
$("none").addEventListener("click", () => {
  chosen.clear();
  draw();
});
runs.forEach((run, place) => {
  run.place = place;
  if (place < 5) choose(run, true);
});
$("app").hidden = false;
mark();
arrange();
draw();
let wide = $("picture").clientWidth;
new ResizeObserver(() => {
  if ($("picture").clientWidth === wide) return;
  wide = $("picture").clientWidth;
  draw();
}).observe($("picture"));
