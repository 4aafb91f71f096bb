"""The pages in a browser: `eval trace --html` and a run's report.html in headless Chromium, at 400 and 1,400 pixels.

Usage: python3 tests/page.py, from the top folder; the programs are in $BUILD (default build). Drives the browser
through its debugging pipe, with Python's own library only. Where there is no Chromium it says so and does nothing.
"""

import base64
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"


class Browser:
    """One tab. Errors of the page (exceptions, console, log) gather in `errors`."""

    def __init__(self, program, folder):
        to_browser, self.pipe_in = os.pipe()
        self.pipe_out, from_browser = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        command = f"exec {program} --headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe " \
                  f"--user-data-dir={folder}/profile 3<&{to_browser} 4>&{from_browser}"
        self.process = subprocess.Popen(["sh", "-c", command], pass_fds=(to_browser, from_browser),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser), os.close(from_browser)
        self.ids, self.buffer, self.session, self.errors = itertools.count(1), b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log":
            self.call(domain + ".enable")

    def call(self, method, **parameters):
        message = {"id": next(self.ids), "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.pipe_in, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                data = os.read(self.pipe_out, 1 << 20)
                if not data:
                    raise RuntimeError("the browser has gone")
                self.buffer += data
            text, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"])[:400])

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def open(self, path, width, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
            mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        # By way of an empty page: else the old one is still there, and complete, when it is asked for.
        for url in "about:blank", "file://" + path:
            self.call("Page.navigate", url=url)
            while self.value("location.href + document.readyState") != url + "complete":
                time.sleep(0.02)
        self.frame()

    def frame(self):
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, key, times=1):
        for _ in range(times):
            for kind in "rawKeyDown", "keyUp":
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        self.frame()

    def centre(self, selector):
        return self.value(f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{ block: 'center' }}); const b = node.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2] }})()""")

    def picture(self):
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])

    def close(self):
        self.call("Browser.close")
        self.process.wait()


KEYS = {"End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
passed, failed = 0, []


def check(what, holds):
    global passed
    if holds:
        passed += 1
    else:
        failed.append(what)
        print("FAILED:", what)


def close(a, b):
    return len(a) == len(b) and all(abs(x - y) <= 1e-5 for x, y in zip(a, b))


def make_runs(programs, fixtures):
    """In the working directory: a tiny model of a tokenizer that has a hostile token, and its pages."""
    def program(name, *arguments):
        done = subprocess.run([f"{programs}/{name}", *arguments], capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{name} {arguments}: {done.stderr.decode()}")
        return done.stdout

    with open(f"{fixtures}/tokenizer.json") as file:
        tokenizer = json.load(file)
    for at, content in enumerate([HOSTILE, "\u202eturned\u2028"]):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 420 + at, "content": content,
            "special": False})
    with open("tokenizer.json", "w") as file:
        json.dump(tokenizer, file)
    with open("text", "w") as file:
        file.write("one two three four five six seven\n" * 200)
    program("data", "encode", "--input", "text", "--tokenizer", "tokenizer.json", "--out", "data")
    built_for = os.environ.get("ROTARY_DIM")  # else each layer turns as it likes
    rope = ["--rotary-dim", built_for] if built_for else ["--rotary-layers", "2,6", "--rope-scaling", "yarn:4,48"]
    program("train", "--data", "data/train_*.bin", "--run", "tiny", "--layers", "2", "--width", "48", "--heads", "4",
            "--kv-heads", "2", "--head-size", "12", *rope, "--qk-norm", "--context", "48", "--batch", "4", "--steps",
            "30", "--val-tokens", "256", "--diagnostics-every", "10")
    prompt = ("one two" + HOSTILE + "three \u202eturned\u2028 \u200f").encode() + b" \xff\xfe four"
    place = ["trace", "--run", "tiny", "--prompt", prompt, "--layer", "1", "--head", "2"]
    program("eval", *place, "--html", "page.html")
    trace = json.loads(program("eval", *place, "--json"))
    other = json.loads(program("eval", *place[:5], "--layer", "0", "--head", "1", "--token", "6", "--against", "2",
        "--json"))
    return trace, other


def test_page(browser, page, trace, other):
    for width in 400, 1400:
        for dark in False, True:
            browser.open(page, width, dark)
            what = f"page, {width} pixels{', dark' if dark else ''}"
            check(what + ": fits its width", browser.value("document.documentElement.scrollWidth") == width)
            background = browser.value("getComputedStyle(document.body).backgroundColor")
            check(what + ": background " + background, (sum(map(int, background[4:-1].split(","))) < 150) == dark)
            check(what + ": agrees with the program",
                not browser.value("document.querySelectorAll('.wrong').length") and
                  "agree" in browser.value("document.getElementById('status').textContent"))
            picture = browser.picture()
            wide, high = struct.unpack(">II", picture[16:24])
            check(f"{what}: picture {wide} x {high}, {len(picture)} bytes",
                  wide == width and 4000 < high < 15000 and len(picture) > 100_000)

    # What the page computes is what the program computed, of the traced head and of another one.
    for t in trace, other:
        row = browser.value(f"""(() => {{ const row = attention_row({t['layer']}, {t['head']}, {t['position']});
            return [row.scores.map(x => x.rotated), row.scores.map(x => x.rest), row.probability] }})()""")
        for name, values in zip(("rotated", "rest", "probability"), row):
            check(f"{name} of layer {t['layer']}, head {t['head']} as in --json", close(values, t["scores"][name]))
    check("before RoPE as in --json", close(
        browser.value(f"[...query({other['layer']}, {other['head']}, {other['position']})]"), other["query"]["before"]))
    score = trace["scores"]["rotated"][trace["against"]] + trace["scores"]["rest"][trace["against"]]
    shown = lambda: float(browser.value("document.getElementById('score').textContent").replace("\u2212", "-"))
    check("the score that is shown", abs(shown() - score) < 6e-5)

    # Hostile text is text.
    check("title", browser.value("document.title").startswith("Partial RoPE: "))
    check("no elements from text", browser.value("document.images.length == 0 && document.scripts.length == 2"))
    chips = browser.value("[...document.querySelectorAll('#text button')].map(x => x.textContent)")
    check("the hostile token, as text", HOSTILE.replace(" ", "\u2423") in chips)
    check("marks that turn text around are named",
        "U+202EturnedU+2028" in chips and not any("\u202e" in x for x in chips))
    check("bytes that are no UTF-8", any("\ufffd" in x or "\\x" in x for x in chips))

    # The sliders, by keyboard.
    def focus(name):
        browser.value(f"document.getElementById('{name}').focus()")
    arrows = lambda: browser.value(
        "[...document.querySelectorAll('#dials .query, #dials .key')].map(x => x.innerHTML).join()")
    if trace["rotary_dim"]:
        before, still = arrows(), shown()
        focus("both"), browser.press("ArrowRight", 5)
        check("slide both: the arrows turn", browser.value("state.both") == 5 and arrows() != before)
        check("slide both: the score stays", shown() == still)
        browser.press("Home")
        focus("alone"), browser.press("ArrowRight", 3)
        check("slide the key alone: the score changes", browser.value("state.alone") == 3 and shown() != still)
        browser.press("Home")
        check("and comes back", shown() == still and arrows() == before)
    focus("R"), browser.press("Home")
    check("R = 0", "R = 0 is NoPE" in browser.value("document.getElementById('channels-say').textContent"))
    browser.press("ArrowRight", 3)
    says = browser.value("document.getElementById('channels-say').textContent")
    check("R = 6: " + says,
        "channels 0 to 5" in says and "(0, 3), (1, 4), (2, 5)" in says and "bytes 0 to 23 of the 48" in says)
    coloured = "document.querySelectorAll('#channels rect:not([fill*=rest])').length"
    check("R = 6: six channels in colour", browser.value(coloured) == 6)
    check("R = 6: 24 MiB at 1 M positions",
        "24 MiB" in browser.value("document.getElementById('table-bytes').textContent"))
    row = browser.value("document.getElementById('row').innerHTML")
    browser.press("End")
    check("R = HS: all in colour, another attention", browser.value(coloured) == 12 and
          browser.value("document.getElementById('row').innerHTML") != row)
    focus("layer"), browser.press("Home")
    focus("head"), browser.press("Home"), browser.press("ArrowRight")
    check("layer and head", browser.value("state.layer == 0 && state.head == 1") and
          "layer 0, head 1" in browser.value("document.getElementById('turning-lead').textContent"))
    focus("t"), browser.press("Home"), browser.press("ArrowRight", other["position"])
    focus("s"), browser.press("Home"), browser.press("ArrowRight", other["against"])
    check("another head, query and key: the score of --json", abs(
        shown() - other["scores"]["rotated"][other["against"]] - other["scores"]["rest"][other["against"]]) < 6e-5)
    focus("t"), browser.press("Home")
    check("no key of the future", browser.value("state.t == 0 && state.s == 0"))
    browser.press("End")

    # The packed row: by keyboard, and under the pointer.
    browser.value("state.slot = state.channel = 0; draw_packed(); document.getElementById('packed').focus()")
    browser.press("ArrowRight"), browser.press("ArrowDown")
    check("arrow keys walk the row",
        "Query head 1, channel 1" in browser.value("document.getElementById('channel').textContent"))
    x, y = browser.centre("#packed svg")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    check("pointing at a channel",
        "Query head 1, channel 1" not in browser.value("document.getElementById('channel').textContent"))

    # Touch, on a phone's width.
    browser.open(page, 400)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = browser.centre("#patterns button:last-child canvas")
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.frame()
    check("touching a pattern", browser.value("state.head") == 3)
    check("and the query and key under the finger",
        browser.value("Math.abs(state.t - T / 2) < T / 4 && state.s <= state.t"))
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    check("every control has a name",
        browser.value("""[...document.querySelectorAll('button, input, [role=img], [role=group]')]
        .every(x => (x.getAttribute('aria-label') || x.textContent || x.getAttribute('aria-labelledby') ||
            '').trim())"""))
    check("no errors: " + " ".join(browser.errors), not browser.errors)

    # A number that is wrong is noticed.
    with open(page) as file:
        text = file.read()
    lse = json.dumps(trace["layers"][0]["lse"][1][7])
    check("the number stands in the page", text.count(lse) == 1)
    with open("wrong.html", "w") as file:
        file.write(text.replace(lse, json.dumps(trace["layers"][0]["lse"][1][7] + 1e-3)))
    browser.open(os.path.abspath("wrong.html"), 1400)
    check("a wrong number is said in red",
        "log-sum-exp" in browser.value("document.querySelector('.wrong[role=alert]').textContent") and
          browser.value("getComputedStyle(document.querySelector('.wrong')).backgroundColor") == "rgb(179, 38, 30)")


def test_report(browser, page):
    browser.errors.clear()
    for width in 400, 1400:
        browser.open(page, width)
        check(f"report, {width} pixels: fits its width", browser.value("document.documentElement.scrollWidth") == width)
        check("report: plots", browser.value("document.querySelectorAll('figure').length") == 7)
        check("report: lines within their plots",
            browser.value("""[...document.querySelectorAll('.plot')].every(p => [...p.querySelectorAll('.line')]
            .every(l => l.getBoundingClientRect().height <= p.getBoundingClientRect().height + 2))"""))
        wide, high = struct.unpack(">II", browser.picture()[16:24])
        check(f"report: picture {wide} x {high}", wide == width and 1000 < high < 6000)
    check("report: no errors: " + " ".join(browser.errors), not browser.errors)
    check("report: it leads to the run's page",
        browser.value("document.querySelector('a').getAttribute('href')") == "page.html")
    browser.open(os.path.join(os.path.dirname(page), "page.html"), 1400)
    check("the page that training wrote",
        not browser.errors and "agree" in browser.value("document.getElementById('status').textContent"))


def main():
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not program:
        print("page: skipped, there is no Chromium")
        return 0
    programs = os.path.abspath(os.environ.get("BUILD", "build"))
    fixtures = os.path.abspath("tests/fixtures")
    top = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trace, other = make_runs(programs, fixtures)
        browser = Browser(program, folder)
        try:
            test_page(browser, folder + "/page.html", trace, other)
            test_report(browser, folder + "/runs/tiny/report.html")
        finally:
            browser.close()
            os.chdir(top)
    print(f"page: {passed} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
