"use strict";
// Asks the server that the page comes from, and no other.

const $ = (id) => document.getElementById(id);
const make = (tag, text, more = {}) => Object.assign(document.createElement(tag), {textContent: text, ...more});
const PAD = 280;
let models = [];
let model = null;
let file = null; // a picture that is sent as it is
let drawn = false;
let light = false; // whether one draws in black on white
let turn = 0; // the question that is shown; answers to earlier ones are dropped

function show(error) {
  $("error").hidden = !error;
  $("error").textContent = error || "";
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = {...options.headers, ...(key ? {Authorization: `Bearer ${key}`} : {})};
  const answer = await fetch(path, {...options, headers});
  const found = await answer.json();
  if (answer.ok) return found;
  if (answer.status === 401) lock();
  throw new Error(found.error);
}

function lock() {
  $("unlock").hidden = false;
  $("app").hidden = true;
  $("key").focus();
}

// What the model takes

const isImage = () => {
  if (model.inputs.length !== 1) return false;
  const shape = model.inputs[0].shape;
  return model.pictures && shape.length === 3 && [1, 3, 4].includes(shape[0]);
};
const isTable = () => model.inputs.every((input) => input.columns);
const isNamed = () => !(model.inputs.length === 1 && model.inputs[0].name === "inputs");

function begin(chosen) {
  model = chosen;
  $("title").textContent = model.name === "model" ? "Ask the model" : `Ask the model “${model.name}”`;
  document.title = $("title").textContent;
  $("picture").hidden = !isImage();
  $("fields").hidden = isImage() || !isTable();
  $("text").hidden = isImage() || isTable();
  $("card").textContent = model.card;
  if (isImage()) {
    const [, height, width] = model.inputs[0].shape;
    const long = Math.max(height, width);
    $("pad").width = Math.round((PAD * width) / long);
    $("pad").height = Math.round((PAD * height) / long);
    $("pad").style.aspectRatio = `${width} / ${height}`;
    $("size").textContent = model.exact_size
      ? `The model takes pictures of ${width} × ${height} pixels. Others are scaled here, in the browser.`
      : "A picture that is chosen is sent as it is.";
    wipe();
  } else if (isTable()) makeFields();
  else $("json").value = JSON.stringify(empty());
  $("curl").textContent = example();
  forget();
}

const shaped = (shape, next) =>
  shape.length ? Array.from({length: shape[0]}, () => shaped(shape.slice(1), next)) : next();
function inputsFrom(next) {
  const found = model.inputs.map((input) => [input.name, shaped(input.shape, () => next(input))]);
  if (!isNamed()) return found[0][1];
  if (found.every(([name], place) => name === String(place))) return found.map(([, value]) => value);
  return Object.fromEntries(found);
}
const empty = () => inputsFrom(() => 0);

function makeFields() {
  const boxes = model.inputs.flatMap((input) =>
    input.columns.map((name, place) => {
      const whole = /int|bool/.test(input.dtype);
      const value = Number([input.typical].flat()[place]).toPrecision(6);
      const box = make("input", "", {type: "number", step: whole ? "1" : "any", value: Number(value), required: true});
      const label = make("label", name);
      label.append(box);
      return label;
    }),
  );
  $("fields").replaceChildren(...boxes);
}

function example() {
  const key = sessionStorage.getItem("key") ? ' -H "Authorization: Bearer $LEARNER_KEY"' : "";
  const url = new URL(`models/${model.name}/predict`, location.href);
  if (isImage()) return `curl${key} -F inputs=@picture.png ${url}`;
  const body = JSON.stringify({inputs: empty()});
  return `curl${key} -H "Content-Type: application/json" -d '${body.length < 400 ? body : '{"inputs": ...}'}' ${url}`;
}

// Drawing

const pad = () => $("pad").getContext("2d", {willReadFrequently: true});
const paper = () => (light ? ["#fff", "#000"] : ["#000", "#fff"]);

function wipe() {
  const context = pad();
  context.fillStyle = paper()[0];
  context.fillRect(0, 0, $("pad").width, $("pad").height);
  file = null;
  drawn = false;
  $("upload").value = "";
  forget();
}

function place(event) {
  const box = $("pad").getBoundingClientRect();
  const scale = $("pad").width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

let last = null;
function stroke(event) {
  const context = pad();
  const to = place(event);
  context.strokeStyle = paper()[1];
  context.lineWidth = Math.min($("pad").width, $("pad").height) / 11;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...(last || to));
  context.lineTo(...to);
  context.stroke();
  last = to;
  file = null;
  drawn = true;
}
$("pad").addEventListener("pointerdown", (event) => {
  $("pad").setPointerCapture(event.pointerId);
  last = null;
  stroke(event);
});
$("pad").addEventListener("pointermove", (event) => {
  if (event.buttons && last) stroke(event);
});
for (const end of ["pointerup", "pointercancel"])
  $("pad").addEventListener(end, () => {
    if (last) predict();
    last = null;
  });
$("clear").addEventListener("click", wipe);

// Black for white: what was drawn or chosen, and what is drawn from now on.
function swapped(canvas) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "difference";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-over";
  return canvas;
}
async function invert() {
  light = !light;
  if (!drawn) return wipe();
  swapped($("pad"));
  if (file) {
    const {width, height} = file.picture;
    const canvas = make("canvas", "", {width, height});
    canvas.getContext("2d").drawImage(file.picture, 0, 0);
    swapped(canvas);
    file = {chosen: await new Promise((done) => canvas.toBlob(done, "image/png")), picture: canvas};
  }
  return predict();
}
$("invert").addEventListener("click", invert);

// Pictures

async function load(chosen) {
  if (!chosen) return;
  let picture;
  try {
    picture = await createImageBitmap(chosen);
  } catch {
    show(`${chosen.name} is not a picture that this browser can read.`);
    return;
  }
  wipe();
  pad().drawImage(picture, 0, 0, $("pad").width, $("pad").height);
  file = {chosen, picture};
  drawn = true;
  predict();
}
$("upload").addEventListener("change", () => load($("upload").files[0]));
$("pad").addEventListener("dragover", (event) => event.preventDefault());
$("pad").addEventListener("drop", (event) => {
  event.preventDefault();
  load(event.dataTransfer.files[0]);
});

// A picture of the size that the model takes: halved step by step, so that no stroke is lost.
function scaled(source, width, height) {
  let [now, w, h] = [source, source.width, source.height];
  while (w !== width || h !== height) {
    [w, h] = [Math.max(width, Math.ceil(w / 2)), Math.max(height, Math.ceil(h / 2))];
    const next = make("canvas", "", {width: w, height: h});
    const context = next.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(now, 0, 0, w, h);
    now = next;
  }
  return now;
}

async function pictureBody() {
  if (file && !model.exact_size) return file.chosen;
  const [, height, width] = model.inputs[0].shape;
  const small = scaled(file ? file.picture : $("pad"), width, height);
  const canvas = make("canvas", "", {width, height});
  canvas.getContext("2d").drawImage(small, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// The question

async function body() {
  if (isImage()) return {body: await pictureBody(), headers: {"Content-Type": "image/png"}};
  let inputs;
  if (isTable()) {
    const boxes = [...$("fields").querySelectorAll("input")];
    const wrong = boxes.find((box) => !box.checkValidity());
    if (wrong) {
      wrong.reportValidity();
      return null;
    }
    inputs = inputsFrom(() => Number(boxes.shift().value));
  } else {
    try {
      inputs = JSON.parse($("json").value);
    } catch (error) {
      show(`This is not JSON: ${error.message}`);
      return null;
    }
  }
  return {body: JSON.stringify({inputs}), headers: {"Content-Type": "application/json"}};
}

function forget() {
  turn += 1;
  show("");
  $("answer").hidden = true;
  $("waiting").hidden = false;
}

async function predict() {
  if (isImage() && !drawn) {
    show("Draw something, or choose a picture.");
    return;
  }
  const mine = ++turn;
  show("");
  try {
    const request = await body();
    if (!request) return;
    const options = {method: "POST", ...request};
    const {predictions} = await ask(`models/${model.name}/predict`, options);
    if (mine !== turn) return;
    answer(predictions[0]);
    if (!model.saliency) return;
    const {saliency} = await ask(`models/${model.name}/saliency`, options);
    if (mine !== turn) return;
    if (isTable()) weigh(saliency, predictions[0]);
    else await overlay(saliency, request.body, predictions[0]);
  } catch (error) {
    if (mine === turn) show(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
}
$("ask").addEventListener("click", predict);
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("fields").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  predict();
});

// The answer

const percent = (share) => (share === null ? "?" : `${(100 * share).toFixed(1)}%`);

function bar(name, value, most, number, kind = "") {
  const row = make("li", "");
  row.append(
    make("span", name, {className: "name", title: name}),
    make("meter", number, {min: 0, max: most, value, className: kind}),
    make("span", number, {className: "number"}),
  );
  return row;
}

function answer(found) {
  $("waiting").hidden = true;
  $("answer").hidden = false;
  $("saliency").hidden = true;
  const shares = Object.entries(found.probabilities || {}).sort((a, b) => b[1] - a[1]);
  const names = Array.isArray(found.label) ? found.label.join(", ") || "none of the classes" : found.label;
  $("label").textContent = found.probabilities ? names : "";
  $("bars").replaceChildren(...shares.slice(0, 10).map(([name, share]) => bar(name, share || 0, 1, percent(share))));
  $("output").hidden = Boolean(found.probabilities);
  $("output").textContent = JSON.stringify(found.output);
}

const colour = (name) => {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
};

// Show the picture or the bars, and the words beside them.
function reveal(shares, table) {
  $("why").textContent = shares ? "What the answer rests on" : "What raises or lowers it";
  $("pro").textContent = shares ? "supports the answer" : "raises the output";
  $("contra").textContent = shares ? "counts against it" : "lowers it";
  $("map").hidden = table;
  $("columns").hidden = $("meaning").hidden = !table;
  $("saliency").hidden = false;
}

// The input in grey, and over it what supports the answer and what counts against it, the stronger the less clear.
async function overlay(values, sent, found) {
  const [height, width] = [values.length, values[0].length];
  const picture = await createImageBitmap(sent);
  const canvas = $("map");
  [canvas.width, canvas.height] = [width, height];
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const most = Math.max(...values.map((row) => Math.max(...row.map(Math.abs)))) || 1;
  const colours = {1: colour("--for"), "-1": colour("--against"), 0: [0, 0, 0]};
  values.flat().forEach((value, place) => {
    const at = 4 * place;
    const grey = (pixels.data[at] + pixels.data[at + 1] + pixels.data[at + 2]) / 3;
    const strength = (0.8 * Math.abs(value)) / most;
    const tint = colours[Math.sign(value)];
    for (let channel = 0; channel < 3; channel++)
      pixels.data[at + channel] = grey * (1 - strength) + tint[channel] * strength;
    pixels.data[at + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
  reveal(Boolean(found.probabilities), false);
}

// A bar for each column of a table, the longest first: what the answer would lose with a typical value.
const COLUMNS = 12;
const SMALL = 0.001; // of a probability
function weigh(values, found) {
  const shares = Boolean(found.probabilities);
  const names = model.inputs.flatMap((input) => input.columns);
  const rows = names.map((name, place) => [name, values[place]]);
  rows.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const most = Math.abs(rows[0][1]) || 1;
  const sign = (value) => (value < 0 ? "−" : "+");
  const size = (value) => (shares ? percent(Math.abs(value)) : Number(Math.abs(value).toPrecision(3)));
  $("columns").replaceChildren(
    ...rows.slice(0, COLUMNS).map(([name, value]) =>
      bar(name, Math.abs(value), most, sign(value) + size(value), value < 0 ? "against" : "for"),
    ),
  );
  const what = shares ? "The probability of the answer" : found.output.length > 1 ? "The largest output" : "The output";
  const rest = rows.length > COLUMNS ? ` The ${COLUMNS} largest of ${rows.length} columns.` : "";
  const sure = shares && most < SMALL ? " No column by itself changes this answer." : "";
  $("meaning").textContent = `${what} compared with the same input where this column has a typical value.${rest}${sure}`;
  reveal(shares, true);
}

// Begin

async function start() {
  try {
    ({models} = await ask("models"));
  } catch (error) {
    if ($("unlock").hidden || sessionStorage.getItem("key")) show(error.message);
    return;
  }
  $("unlock").hidden = true;
  $("app").hidden = false;
  $("choice").hidden = models.length < 2;
  $("model").replaceChildren(...models.map((each) => make("option", each.name)));
  begin(models[0]);
}
$("model").addEventListener("change", () => begin(models[$("model").selectedIndex]));
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  show("");
  sessionStorage.setItem("key", $("key").value);
  start();
});
start();
