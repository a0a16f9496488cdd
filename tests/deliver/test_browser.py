"""The page of a run in a browser (`make browser` installs it): wide and narrow, light and dark, clicked through."""

import json
import shutil

import pytest

from spikedistill.deliver.report import report
from spikedistill.recipes.choices import StudentChoice, TeacherChoice
from spikedistill.recipes.distill import Distill, distill
from spikedistill.recipes.teach import Teach, teach
from spikedistill.train.recipe import Data, Training
from spikedistill.train.run import Run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.usefixtures("without_compiler"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: `make browser` installs one, as CI does"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_blobs):
    folder = tmp_path_factory.mktemp("browser")
    write_blobs(folder, 96, 48)
    data = Data(str(folder / "blobs.npz"), validation=0.25)
    training = Training(epochs=2, batch_size=16, lr=0.05, precision="fp32", device="cpu")
    teach(Teach("vgg9", width=4, data=data, training=training), folder / "ann")
    choice = StudentChoice(timesteps=2)
    distill(Distill(TeacherChoice(str(folder / "ann")), choice, data=data, training=training), folder / "student")
    return folder


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(home, browser):
    file = report([home / "student"], out=home / "page.html")
    browser.set_window_size(1200, 900)
    browser.get(file.as_uri())
    return browser


def found(browser, selector):
    return browser.find_elements("css selector", selector)


def test_it_opens_without_an_error_and_without_a_network(opened):
    assert opened.get_log("browser") == []
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_a_chosen_sample_is_shown_alone_by_mouse_and_by_keyboard(opened):
    radios, panels = found(opened, "fieldset input[type=radio]"), found(opened, ".panel")
    assert len(radios) == len(panels) > 2
    for place in (2, 1):
        opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", radios[place])
        radios[place].click()
        assert [panel.is_displayed() for panel in panels] == [number == place for number in range(len(panels))]
    radios[1].send_keys("\ue014")  # the arrow to the right
    assert [panel.is_displayed() for panel in panels] == [number == 2 for number in range(len(panels))]
    assert opened.get_log("browser") == []


def test_the_numbers_of_a_picture_open_and_are_those_of_the_run(home, opened):
    details = opened.find_element("id", "run0-accuracy-numbers")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", details)
    details.find_element("tag name", "summary").click()
    cells = [cell.text for cell in details.find_elements("css selector", "tbody td")]
    lines = Run(home / "student").lines("metrics")
    expected = [[one["epoch"], one["train_accuracy"], one["validation_accuracy"]] for one in lines]
    assert [float(cell) for cell in cells] == pytest.approx([x for row in expected for x in row], rel=1e-3)
    accuracy = json.loads((home / "student" / "results.json").read_text())["test_accuracy"]
    assert f"{accuracy:.2f} %" in [one.text for one in found(opened, ".tiles b")]


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_runs_out_of_the_window(opened, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    sizes = opened.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert sizes[0] <= sizes[1] <= width and sizes[1] > width - 20
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_text_is_readable_in_light_and_dark(opened):
    """The contrast of text and ground is at least 4.5 (WCAG 2, level AA), in pictures too."""
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ground, *texts = opened.execute_script(
            "const c = (q, p) => getComputedStyle(document.querySelector(q))[p];"
            "return [c('body', 'backgroundColor'), c('body', 'color'), c('figcaption', 'color'), c('a', 'color'),"
            " c('figure svg text', 'fill')]"
        )
        assert all(contrast(ground, text) >= 4.5 for text in texts), (scheme, ground, texts)
        seen[scheme] = ground
    assert seen["light"] != seen["dark"]


def contrast(one, other):
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
