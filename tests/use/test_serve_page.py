"""The page of a served model in a browser, as a person meets it: draw, upload, fill in; wide and narrow, light and dark; no other host."""
import io
import shutil
import threading
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.use.serve import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("playwright", "starlette", "uvicorn", "captum", "PIL") if find_spec(name) is None] + ["chromium"] * (CHROMIUM is None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
SECONDS = 60


class Table(nn.Module):
    def forward(self, age, scores): return torch.stack([scores.sum(1) - age, age - scores.sum(1)], 1)


class Named(dict): classes = ["young <b>", "old"]


@pytest.fixture(scope="module")
def learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    learn = Learner(model, torch.optim.AdamW, F.cross_entropy, digits())
    learn.train(5, learning_rate=0.01, test=False)
    return learn


@pytest.fixture(scope="module")
def service(learn):
    rows = {"age": torch.rand(4), "scores": torch.rand(4, 3)}
    table = Learner(Table(), None, F.cross_entropy, Named(validation=[(rows, torch.zeros(4, dtype=torch.long))]))
    series = Learner(nn.Flatten(), None, F.mse_loss, {"validation": [(torch.rand(2, 100), torch.rand(2, 100))]})
    with serve({"digits": learn, "table": table, "series": series}, port=0) as service: yield service


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Page:
    "What a person does with the page, and what it does behind their back."

    def __init__(self, browser, url, width=1200, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.asked, self.problems = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.url = url
        self.page.goto(url)

    def __enter__(self): return self

    def __exit__(self, *error):
        self.context.close()
        if error[0] is None:
            assert self.problems == []
            assert all(url.startswith((self.url, "data:", "blob:")) for url in self.asked), self.asked

    def draw(self, *points):
        box = self.page.locator("#pad").bounding_box()
        for number, (x, y) in enumerate(points):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
            if not number: self.page.mouse.down()
        self.page.mouse.up()

    def label(self):
        self.page.wait_for_selector("#answer:not([hidden])")
        return self.page.inner_text("#label")

    def wait_for_saliency(self):
        self.page.wait_for_selector("#saliency:not([hidden])")
        return self.page.evaluate("""() => { const map = document.querySelector("#map");
            const data = map.getContext("2d").getImageData(0, 0, map.width, map.height).data; return [map.width, map.height, new Set(data).size] }""")


SEVEN = (0.3, 0.18), (0.72, 0.18), (0.45, 0.82)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_person_draws_and_sees_the_answer_and_what_speaks_for_it(browser, service, width, scheme):
    with Page(browser, service.url, width, scheme) as one:
        one.page.wait_for_selector("#pad")
        one.draw(*SEVEN)
        assert one.label() == "7"
        rows = one.page.locator("#bars li")
        shares = [float(row.rpartition("\n")[2].rstrip("%")) for row in rows.all_inner_texts()]
        assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 99 < sum(shares) < 101
        width_of_map, height_of_map, colours = one.wait_for_saliency()
        assert (width_of_map, height_of_map) == (8, 8) and colours > 10
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        small = [box for box in (each.bounding_box() for each in one.page.locator("button:visible, .button:visible, select:visible").all()) if box["height"] < 40]
        assert small == []  # a finger finds them
        background = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
        one.page.click("#clear")
        assert not one.page.is_visible("#answer")
        one.page.click("#ask")
        assert "Draw something" in one.page.inner_text("#error")


def test_a_picture_is_chosen_and_answered_as_by_predict(browser, service, learn):
    from PIL import Image
    from playwright.sync_api import expect
    images = next(iter(learn.dataloaders["test"]))[0]
    with Page(browser, service.url) as one:
        for image in images[:3]:
            Image.fromarray((image[0] * 255).round().byte().numpy()).save(file := io.BytesIO(), "png")
            one.page.wait_for_selector("#pad")
            with one.page.expect_response(lambda answer: answer.url.endswith("/predict")) as answer:
                one.page.set_input_files("#upload", {"name": "digit.png", "mimeType": "image/png", "buffer": file.getvalue()})
            expected = learn.predict(file.getvalue())
            found = answer.value.json()["predictions"][0]
            assert torch.equal(torch.tensor(found["output"]), expected.output)  # 8 x 8 pixels are sent as they are
            expect(one.page.locator("#label")).to_have_text(expected.label)
            one.wait_for_saliency()


def test_a_picture_of_another_size_is_scaled(browser, service):
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (640, 480), "black")
    ImageDraw.Draw(picture).line([(200, 90), (450, 90), (290, 400)], "white", 50, "curve")
    picture.save(file := io.BytesIO(), "jpeg")
    with Page(browser, service.url) as one:
        one.page.set_input_files("#upload", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()})
        assert one.label() == "7"
    with Page(browser, service.url) as one:
        one.page.set_input_files("#upload", {"name": "text.png", "mimeType": "image/png", "buffer": b"not a picture"})
        one.page.wait_for_selector("#error:not([hidden])")
        assert "text.png is not a picture" in one.page.inner_text("#error")


def test_dark_ink_on_white_paper_is_inverted_for_a_model_of_light_strokes(browser, service):
    from PIL import Image, ImageDraw
    from playwright.sync_api import expect
    picture = Image.new("L", (64, 48), "white")  # the seven of above, in black on white
    ImageDraw.Draw(picture).line([(20, 9), (45, 9), (29, 40)], "black", 5, "curve")
    picture.save(file := io.BytesIO(), "png")
    with Page(browser, service.url, 390) as one:
        one.page.set_input_files("#upload", {"name": "paper.png", "mimeType": "image/png", "buffer": file.getvalue()})
        one.page.wait_for_selector("#answer:not([hidden])")
        with one.page.expect_response(lambda answer: answer.url.endswith("/predict")): one.page.click("#invert")
        expect(one.page.locator("#label")).to_have_text("7")
        corner = "document.querySelector('#pad').getContext('2d').getImageData(2, 2, 1, 1).data[0]"
        assert one.page.evaluate(corner) == 0  # what is shown is what was sent
        one.page.click("#clear")
        assert one.page.evaluate(corner) == 255  # and one draws in black on white from now on
        one.page.click("#invert")
        assert one.page.evaluate(corner) == 0 and not one.page.is_visible("#answer")
        one.draw(*SEVEN)
        assert one.label() == "7"


@pytest.mark.parametrize("width", [1200, 390])
def test_fields_are_filled_in(browser, service, width):
    from playwright.sync_api import expect
    with Page(browser, service.url, width) as one:
        one.page.select_option("#model", "table")
        boxes = one.page.locator("#fields input")
        assert one.page.locator("#fields label").all_inner_texts() == ["age", "scores 1", "scores 2", "scores 3"]
        for place, value in enumerate(["2.5", "1", "-1", "0.5"]): boxes.nth(place).fill(value)
        one.page.click("#ask")
        assert one.label() == "old"
        one.page.wait_for_selector("#columns:visible")
        bars = one.page.locator("#columns li")
        names, numbers = zip(*(row.split("\n")[::len(row.split("\n")) - 1] for row in bars.all_inner_texts()), strict=True)
        assert set(names) == {"age", "scores 1", "scores 2", "scores 3"}
        found = [float(number.replace("\N{MINUS SIGN}", "-").rstrip("%")) for number in numbers]
        assert [abs(number) for number in found] == sorted(map(abs, found), reverse=True) and found[names.index("age")] > 0
        assert not one.page.is_visible("#map") and "typical value" in one.page.inner_text("#meaning")
        boxes.nth(0).fill("-9")
        boxes.nth(0).press("Enter")
        expect(one.page.locator("#label")).to_have_text("young <b>")  # text, and no markup
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
        boxes.nth(1).fill("")
        one.page.click("#ask")
        assert one.page.evaluate("document.querySelector('#fields input:invalid') === document.activeElement")


def test_other_inputs_are_written_as_json(browser, service):
    with Page(browser, service.url) as one:
        one.page.select_option("#model", "series")
        one.page.click("#ask")
        one.page.wait_for_selector("#output:not([hidden])")
        assert one.page.inner_text("#output").startswith("[0,0,")
        one.page.fill("#json", "[1, 2")
        one.page.click("#ask")
        assert "This is not JSON" in one.page.inner_text("#error")


def test_the_line_of_the_server_is_shown(browser, service):
    with Page(browser, service.url) as one:
        one.page.select_option("#model", "series")
        one.page.fill("#json", '["a"]')
        one.page.click("#ask")
        one.page.wait_for_selector("#error:not([hidden])")
        assert "inputs holds text" in one.page.inner_text("#error")
        one.problems.clear()  # the browser notes the status 422


def test_a_key_is_asked_for_once(browser, learn):
    with serve(learn, port=0, key="a-long-secret") as service, Page(browser, service.url) as one:
        one.page.wait_for_selector("#unlock:not([hidden])")
        one.page.fill("#key", "wrong")
        one.page.click("#unlock button")
        one.page.wait_for_selector("#error:not([hidden])")
        assert "the key is missing or wrong" in one.page.inner_text("#error")
        one.page.fill("#key", "a-long-secret")
        one.page.click("#unlock button")
        one.page.wait_for_selector("#pad:visible")
        one.draw(*SEVEN)
        assert one.label() == "7"
        one.page.reload()
        one.page.wait_for_selector("#pad:visible")
        assert not any("a-long-secret" in url for url in one.asked)
        one.problems.clear()  # the browser notes the status 401


def test_a_server_that_has_gone_is_told(browser, learn):
    service = serve(learn, port=0)
    with Page(browser, service.url) as one:
        one.page.wait_for_selector("#pad:visible")
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        stopping.join()
        one.draw(*SEVEN)
        one.page.wait_for_selector("#error:not([hidden])")
        assert "cannot be reached" in one.page.inner_text("#error")
        one.problems.clear()


def test_keys_alone_are_enough(browser, service):
    with Page(browser, service.url) as one:
        one.page.select_option("#model", "table")
        one.page.focus("#fields input")
        one.page.keyboard.press("Control+A")
        one.page.keyboard.type("3")
        for _ in range(4): one.page.keyboard.press("Tab")
        assert one.page.evaluate("document.activeElement.id") == "ask"
        one.page.keyboard.press("Enter")
        assert one.label() == "old"
