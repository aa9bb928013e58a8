"""The page of `soap-net app`: what its sessions do, what it serves and to whom, and the whole of it in a browser."""

from __future__ import annotations

import copy
import html
import http.client
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from soap_net import session as sessions
from soap_net.classify import Classifier
from soap_net.cli import main
from soap_net.config import Config
from soap_net.data.clips import Clip
from soap_net.errors import UserError
from soap_net.interrupts import Interrupted
from soap_net.models import build_model
from soap_net.session import Session

pytest.importorskip("gradio", reason="Gradio is not installed: pip install '.[app]'")
from soap_net import app
from soap_net.app import answer, confused, expectation, looked_at, serving

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def start(tiny_run: Callable[..., Config]) -> Classifier:
    config = tiny_run(model__head="prototype", model__head_options={})
    return Classifier(build_model(config.model, config.data.frames, seed=0), config)


@pytest.fixture
def zips(tiny_data: Path, tmp_path: Path) -> dict[str, list[Path]]:
    """Three zips of frames for each of two classes."""
    return {
        f"c{i}": [
            Path(shutil.make_archive(str(tmp_path / f"c{i}v{k}"), "zip", tiny_data / f"test (class {i})" / f"v{k}"))
            for k in range(3)
        ]
        for i in range(2)
    }


def ignore(count: int) -> None:
    """Takes what progress tells."""


def learnt(start: Classifier, zips: dict[str, list[Path]], home: Path) -> Session:
    session = Session.begin(start, home)
    for name, files in zips.items():
        assert session.put(name, files) == []
    assert session.learn(ignore) == []
    return session


def test_a_session_answers_as_a_classifier_that_learnt_the_same(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path
) -> None:
    session = learnt(start, {name: files[:2] for name, files in zips.items()}, tmp_path)
    assert session.rows() == [["c0", 2, 0], ["c1", 2, 0]]
    assert session.put("c1", zips["c1"][2:]) == []
    assert session.rows() == [["c0", 2, 0], ["c1", 2, 1]]
    session.learn(ignore)
    assert not [*session.folder.iterdir()], "clips that were learnt are gone"

    oracle = Classifier(start.model, start.config)
    oracle.learn({"c0": [Clip(z) for z in zips["c0"][:2]], "c1": [Clip(z) for z in zips["c1"]]})
    query = Clip(zips["c0"][2])
    assert session.classify(query, ignore) == oracle.classify([query])[0]
    assert start.classes == (), "sessions do not share what they learn"


def test_clips_that_are_cut_short_are_taken_and_told_of(
    start: Classifier,
    zips: dict[str, list[Path]],
    cut_video: Callable[[Path], tuple[Path, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, frames = cut_video(tmp_path / "cut.mp4")
    told = f"cut.mp4: the file is cut short: {frames} of its 30 frames are there"
    shown: list[str] = []
    monkeypatch.setattr(app.gr, "Warning", lambda text, **_: shown.append(text))
    session = Session.begin(start, tmp_path)
    do = app._Handlers(start, tmp_path)
    do.put(session, "c0", [str(path), *map(str, zips["c0"])], None)
    session.put("c1", zips["c1"])
    assert shown == [told]
    assert session.rows() == [["c0", 0, 4], ["c1", 0, 3]]
    session.learn(ignore)
    assert session.classify(Clip(path), ignore).cut == f"{path.parent}/{told}"
    do.classify(session, str(path), None, lambda *_, **__: None)
    assert [text.endswith(told) for text in shown] == [True, True]


def test_what_cannot_be_learnt_is_refused_at_once(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.begin(start, tmp_path)
    for name, files, message in (
        ("", zips["c0"], "give the class a name"),
        ("a/b", zips["c0"], "without a slash"),
        ("a", [], "choose or record clips"),
        ("a", zips["c0"] * 200, "more than 500 clips"),
    ):
        with pytest.raises(UserError, match=message):
            session.put(name, files)
    (tmp_path / "broken.mp4").write_text("no video")
    [refused] = session.put("a", [tmp_path / "broken.mp4", zips["c0"][0]])
    assert "broken.mp4: not a video" in refused
    assert session.rows() == [["a", 0, 1]]
    with pytest.raises(UserError, match="second class"):
        session.learn(ignore)
    monkeypatch.setattr(sessions, "LONGEST_CLIP", 4)
    [refused] = session.put("a", zips["c0"][1:2])
    assert "has 5 frames; a clip here may have 4" in refused
    with pytest.raises(UserError, match="has 5 frames"):
        session.classify(Clip(zips["c0"][0]), ignore)
    session.close()
    assert not session.folder.exists()


def test_recordings_all_of_one_name_stay_apart(start: Classifier, zips: dict[str, list[Path]], tmp_path: Path) -> None:
    recorded = [tmp_path / folder / f"{sessions.RECORDED}.zip" for folder in "ab"]
    for source, target in zip(zips["c0"], recorded, strict=False):
        target.parent.mkdir()
        shutil.copy(source, target)
    session = learnt(start, {"wave": recorded[:1], "c1": zips["c1"]}, tmp_path)
    session.put("wave", recorded[1:])
    session.learn(ignore)
    assert session.classifier.counts() == {"wave": 2, "c1": 3}


def test_classes_and_clips_waiting_or_learnt_are_forgotten(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path
) -> None:
    session = learnt(start, {**zips, "third": zips["c0"]}, tmp_path)
    session.put("new", zips["c1"][:2])
    assert {"c0", "c0/c0v1.zip", "new", "new/c1v1.zip"} <= set(session.names())
    for name in ("new/c1v0.zip", "c0/c0v1.zip", "third"):
        session.forget(name)
    assert session.rows() == [["c0", 2, 0], ["c1", 3, 0], ["new", 0, 1]]
    session.forget("new")
    with pytest.raises(UserError, match="no class or clip 'new'"):
        session.forget("new")
    with pytest.raises(UserError, match="at least 2 classes"):
        session.forget("c0")


def test_work_is_stopped_and_changes_nothing(start: Classifier, zips: dict[str, list[Path]], tmp_path: Path) -> None:
    session = Session.begin(start, tmp_path)
    for name, files in zips.items():
        session.put(name, files * 2)  # more than are read at once
    told: list[int] = []

    def stopping(count: int) -> None:
        told.append(count)
        session.stop.set()

    with pytest.raises(Interrupted, match="stopped"):
        session.learn(stopping)
    assert told == [8]
    assert session.rows() == [["c0", 0, 6], ["c1", 0, 6]]
    assert len(session.learn(ignore)) == 6  # the copies
    assert session.classifier.counts() == {"c0": 3, "c1": 3}


def test_clips_that_come_while_others_are_learnt_still_wait(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path
) -> None:
    session = Session.begin(start, tmp_path)
    for name, files in zips.items():
        session.put(name, files[:2])
    late = [("c0", zips["c0"][2:]), ("new", zips["c1"][2:])]

    def meanwhile(count: int) -> None:
        while late:
            session.put(*late.pop())

    session.learn(meanwhile)
    assert session.rows() == [["c0", 2, 1], ["c1", 2, 0], ["new", 0, 1]]
    session.learn(ignore)
    assert session.classifier.counts() == {"c0": 3, "c1": 2, "new": 1}


def test_a_clip_that_comes_while_learnt_ones_are_taken_away_waits_on(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(dict[str, list[Clip]]):
        def __delitem__(self, name: str) -> None:  # of a class of which no clip was left a moment before
            if name == "c0":
                late.start()
                late.join(1)
            super().__delitem__(name)

    session = Session(copy.copy(start), tmp_path / "session", _waiting=Waiting())
    session.folder.mkdir()
    for name, files in zips.items():
        session.put(name, files[:2])
    late = threading.Thread(target=session.put, args=["c0", zips["c0"][2:]])
    monkeypatch.setattr(sessions, "check_clip", ignore)
    session.learn(ignore)
    late.join(30)
    assert session.rows() == [["c0", 2, 1], ["c1", 2, 0]]
    assert "c0/c0v2.zip" in session.names()


def test_stopped_work_goes_before_the_next(start: Classifier, zips: dict[str, list[Path]], tmp_path: Path) -> None:
    session, began, leave = Session.begin(start, tmp_path), threading.Event(), threading.Event()
    for name, files in zips.items():
        session.put(name, files * 3)  # more than are read before progress is told
    ends: list[object] = []

    def slow(count: int) -> None:
        began.set()
        leave.wait(30)

    def learn(progress: Callable[[int], object]) -> None:
        try:
            ends.append(session.learn(progress))
        except Interrupted as stopped:
            ends.append(stopped)

    first, second = threading.Thread(target=learn, args=[slow]), threading.Thread(target=learn, args=[ignore])
    first.start()
    assert began.wait(30)
    session.stop.set()
    second.start()
    leave.set()
    for thread in (first, second):
        thread.join(60)
    assert isinstance(ends[0], Interrupted)
    [copies] = ends[1:]
    assert isinstance(copies, list)
    assert len(copies) == 12
    assert session.classifier.counts() == {"c0": 3, "c1": 3}


def test_what_is_no_clip_by_its_name_is_refused(start: Classifier, tmp_path: Path) -> None:
    session = Session.begin(start, tmp_path)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n")
    [refused] = session.put("a", [tmp_path / "list.m3u8"])
    assert "neither a video nor a zip" in refused
    with pytest.raises(UserError, match="neither a video nor a zip"):
        session.classify(Clip(tmp_path / "list.m3u8"), ignore)


def test_a_saved_classifier_is_taken_on_by_its_own_model_alone(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path, tiny_run: Callable[..., Config]
) -> None:
    session = learnt(start, zips, tmp_path)
    session.classifier.save(tmp_path / "my.classifier")
    fresh = Session.begin(start, tmp_path)
    fresh.classifier.restore(tmp_path / "my.classifier")
    query = Clip(zips["c1"][0])
    assert fresh.classify(query, ignore) == session.classify(query, ignore)
    other = replace(start.config, data=replace(start.config.data, resize=10))
    for stranger in (
        Classifier(start.model, other),
        Classifier(build_model(start.config.model, start.config.data.frames, seed=1), start.config),
    ):
        with pytest.raises(UserError, match="was made with other weights or settings"):
            stranger.restore(tmp_path / "my.classifier")
        assert stranger.classes == ()


@pytest.mark.parametrize("by", ["appearance", "motion", "both"])
def test_what_a_page_looks_at_is_chosen_after_learning(
    zips: dict[str, list[Path]], tmp_path: Path, tiny_run: Callable[..., Config], by: str
) -> None:
    """As if learnt that way from the start; other sessions on the same model go on as they did."""
    config = tiny_run(model__head="views", model__head_options={})
    start = Classifier.from_config(config, "cpu")
    session, other = (learnt(start, zips, tmp_path) for _ in range(2))
    assert session.views() == ("auto", ["auto", "appearance", "motion", "both"])
    query = Clip(zips["c1"][2])
    before = session.classify(query, ignore)
    session.look_at(by)
    options = {**config.model.head_options, "by": by}
    oracle = Classifier.from_config(replace(config, model=replace(config.model, head_options=options)), "cpu")
    oracle.learn({name: [Clip(file) for file in files] for name, files in zips.items()})
    found, expected = session.classify(query, ignore), oracle.classify([query])[0]
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert session.classifier.calibration.expected == oracle.calibration.expected
    assert other.classify(query, ignore) == before
    session.classifier.save(tmp_path / "by.classifier")
    other.restore(tmp_path / "by.classifier")
    assert (other.views()[0], other.classify(query, ignore)) == (by, found)
    session.look_at("auto")
    assert session.classify(query, ignore) == before


def test_what_cannot_be_looked_at_is_refused(
    start: Classifier, tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    assert Session.begin(start, tmp_path).views() == ("", [])
    with pytest.raises(UserError, match="the head views to choose, not for prototype"):
        start.look_at("motion")
    still = Classifier.from_config(tiny_run(model__head="views", model__head_options={"by": "motion"}), "cpu")
    assert Session.begin(still, tmp_path).views() == ("motion", ["motion"])
    still.look_at("appearance")
    with pytest.raises(UserError, match="auto looks at differences, and clips are read without here"):
        still.look_at("auto")
    with pytest.raises(UserError, match="by is 'moton'"):
        still.look_at("moton")
    assert still.config.model.head_options == {"by": "appearance"}


def test_what_to_expect_is_said_and_the_confused_are_counted(
    start: Classifier, zips: dict[str, list[Path]], tmp_path: Path
) -> None:
    evil = "<script>*x*"
    assert "Nothing is learnt yet" in expectation(start)
    assert confused(start) == ""
    session = learnt(start, {"c0": zips["c0"][:1], evil: zips["c1"][:1]}, tmp_path)
    assert "how often it will be right can't be told" in expectation(session.classifier)
    assert confused(session.classifier) == ""
    session = learnt(start, {"c0": zips["c0"], evil: zips["c1"]}, tmp_path)
    calibration = session.classifier.calibration
    assert f"Expect {calibration.expected}" in expectation(session.classifier)
    table = confused(session.classifier)
    assert "<script" not in table
    cells = [cell.partition(">")[2].partition("<")[0] for cell in table.split("<td")[1:]]
    assert [int(cell or 0) for cell in cells] == [count for row in calibration.confusion for count in row]
    prediction = session.classify(Clip(zips["c1"][0]), ignore)
    shown = answer(prediction)
    assert not {"<", "*"} & {*shown}
    assert html.unescape(shown) == f"### {prediction.nearest}, {100 * max(prediction.probabilities.values()):.0f} %"
    assert answer(replace(prediction, known=False)).startswith("### None of these classes\nThe nearest is ")


@pytest.mark.parametrize("soap", [True, False])
def test_frames_are_shown_and_with_soap_its_priors(
    soap: bool, tiny_run: Callable[..., Config], tiny_data: Path
) -> None:
    config = tiny_run(model__soap={"enabled": soap, "tuple_sizes": [1, 2], "hidden_channels": 4})
    classifier = Classifier(build_model(config.model, config.data.frames, seed=0), config)
    shown = looked_at(classifier, Clip(tiny_data / "test (class 0)" / "v0"))
    labels = [part.partition("</b>")[0] for part in shown.split("<b>")[1:]]
    priors = ["3DEM", "CWEM", "HMEM, red", "HMEM, green", "HMEM, blue", "sum"]
    assert labels == ["frames", *(priors if soap else [])]
    assert shown.count("data:image/png;base64,") == len(labels)


# What is served


def request(address: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """The answer to a path sent as it is."""
    server = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    with_body = {} if body is None else {"Content-Type": "application/json"}
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    server.request("GET" if body is None else "POST", path, body=sent, headers={**with_body, **headers})
    answered = server.getresponse()
    return answered.status, answered.read()


def events(address: str, name: str, data: list[Any]) -> str:
    """What the page's event of that name answers to such data, sent without the page."""
    config = json.loads(request(address, "/config")[1])
    [event] = [each["id"] for each in config["dependencies"] if each["api_name"] == name]
    sent = {"fn_index": event, "data": data, "session_hash": "stranger"}
    status, text = request(address, "/gradio_api/queue/join", sent)
    assert status == 200, text
    return request(address, "/gradio_api/queue/data?session_hash=stranger")[1].decode()


@pytest.fixture
def address(start: Classifier, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A page, served where Gradio's variables for other pages would open the machine."""
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    with serving(start) as address:
        yield address
    assert os.environ["GRADIO_ALLOWED_PATHS"] == "/"


def test_no_file_of_the_machine_is_served(address: str, start: Classifier, tmp_path: Path) -> None:
    secret = tmp_path / "secret.zip"
    secret.write_text("TOP SECRET")
    up = "/.." * 20
    for path in (secret, f"{up}{secret}", f"{str(up).replace('.', '%2e')}{secret}", f"{Path.cwd()}{up}{secret}"):
        for prefix in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/svelte/", "/gradio_api/stream/", "/"):
            status, text = request(address, f"{prefix}{path}")
            assert (status in (307, 400, 403, 404), b"SECRET" in text) == (True, False), (prefix, path, status)
    inside, missing = (request(address, f"/gradio_api/file={path}")[0] for path in (secret, tmp_path / "none"))
    assert inside == missing, "nor does the answer tell what exists"
    stolen = {"path": str(secret), "orig_name": "a.zip", "meta": {"_type": "gradio.FileData"}}
    for name, data in (
        ("put", [None, "a", [stolen], None]),
        ("put", [None, "a", None, {"video": stolen, **stolen}]),
        ("restore", [None, stolen]),
        ("trying", [None, stolen, None]),
    ):
        told = events(address, name, data)
        assert '"success":false' in told.replace(" ", ""), (name, told)
        assert "SECRET" not in told
        assert "a/secret.zip" not in told


def test_the_page_is_for_this_machine_and_sends_nothing_away(address: str) -> None:
    assert urlsplit(address).hostname == "127.0.0.1"
    config = json.loads(request(address, "/config")[1])
    assert not config["analytics_enabled"]
    assert json.loads(request(address, "/gradio_api/info")[1]) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert request(address, "/", Host="evil.example")[0] == 400
    assert request(address, "/")[0] == 200


def test_uploads_are_bounded(start: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(address: str, size: int) -> int:
        lines = ["--b", 'Content-Disposition: form-data; name="files"; filename="a.zip"', "", "x" * size, "--b--", ""]
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        return request(address, "/gradio_api/upload", "\r\n".join(lines).encode(), **kind)[0]

    monkeypatch.setattr(app, "LARGEST_FILE", 500)
    with serving(start) as address:
        assert upload(address, 400) == 200
        assert upload(address, 600) == 413


def test_a_port_that_is_taken_is_named(address: str, start: Classifier) -> None:
    port = urlsplit(address).port
    with pytest.raises(UserError, match=f"can't be served at 127.0.0.1, port {port}"), serving(start, port=port):
        pass


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "soap_net.app")
    assert main(["app"]) == 2
    assert capsys.readouterr().err == ("soap-net: the page needs Gradio: pip install 'gradio>=6.0'\n")


# In a browser


@contextmanager
def browser_page(hosts: set[str] | None = None) -> Iterator[Any]:
    """A page of a headless Chromium with a made-up webcam; `hosts` is told whom it asked for anything."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright, which drives the browser, is not installed: pip install playwright"
    )
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no Chromium on this machine")
    webcam = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        # The sandbox of its own is not to be had as root or in most containers.
        browser = driver.chromium.launch(executable_path=found[0], args=["--no-sandbox", *webcam])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda asked: None if hosts is None else hosts.add(urlsplit(asked.url).netloc))
        yield page
        browser.close()


def add_clips(page: Any, name: str, files: list[Path]) -> None:
    page.get_by_label("Class", exact=True).fill(name)
    page.locator("#clips input[type=file]").set_input_files(files)
    page.locator("#clips", has_text=files[-1].stem[-8:]).wait_for()
    page.get_by_role("button", name="Add these clips").click()
    page.locator("#clips", has_text="Drop File Here").wait_for()
    page.locator("#classes", has_text=name).wait_for()
    assert f"{name} 0 {len(files)}" in rows(page)


def rows(page: Any) -> str:
    """The words in the table of classes."""
    return " ".join(page.locator("#classes").inner_text().split())


def try_clip(page: Any, file: Path) -> str:
    page.locator("#clip input[type=file]").set_input_files(file)
    page.locator("#clip", has_text=file.stem[-8:]).wait_for()
    page.get_by_role("button", name="Classify").click()
    page.locator("#answer h3").wait_for()
    return page.locator("#answer h3").inner_text()


@pytest.mark.slow
def test_from_an_empty_page_to_right_answers_on_real_clips(tmp_path: Path) -> None:
    if not (DATA / "ucf101_9").is_dir():
        pytest.skip("needs the data set ucf101_9, which does not come with the project")
    clips = {name: sorted((DATA / "ucf101_9" / name).iterdir()) for name in ("Archery", "BabyCrawling", "Basketball")}
    hosts: set[str] = set()
    with serving(Classifier.from_config(device="cpu")) as address, browser_page(hosts) as page:
        page.goto(address)
        page.locator("#expected", has_text="Nothing is learnt yet").wait_for()
        for name, files in clips.items():
            add_clips(page, name, files[:5])
        page.get_by_role("button", name="Learn", exact=True).click()
        page.locator("#expected", has_text="Expect about").wait_for()
        expected = page.locator("#expected").inner_text()
        assert page.locator("table.confused td").count() == 9
        answered = try_clip(page, clips["BabyCrawling"][7])
        assert answered.startswith("BabyCrawling, ")
        page.locator("figure.strip img").wait_for()
        looks = page.locator("#expected", has_text="Looks at")
        looks.wait_for()
        page.get_by_role("radio", name="motion").check()
        looks.wait_for(state="detached")  # what was chosen by hand is not told as found out
        page.get_by_role("radio", name="auto").check()
        looks.wait_for()
        assert page.locator("#expected").inner_text() == expected

        page.get_by_text("Forget, save, load").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save the classifier").click()
        download.value.save_as(tmp_path / "my.classifier")
        page.reload()
        page.locator("#expected", has_text="Nothing is learnt yet").wait_for()
        page.get_by_text("Forget, save, load").click()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Load a classifier").click()
        chooser.value.set_files(tmp_path / "my.classifier")
        page.locator("#expected", has_text="Expect about").wait_for()
        assert page.locator("#expected").inner_text() == expected
        assert try_clip(page, clips["BabyCrawling"][7]) == answered
        assert hosts == {urlsplit(address).netloc}, "nothing is asked of another machine"


@pytest.mark.slow
def test_a_clip_is_recorded_by_the_webcam(start: Classifier) -> None:
    with serving(start) as address, browser_page() as page:
        page.goto(address)
        page.get_by_label("Class", exact=True).fill("wave")
        page.get_by_role("tab", name="Webcam").first.click()
        page.get_by_text("Click to Access Webcam").first.click()
        page.get_by_label("start recording").first.click()
        page.wait_for_timeout(5000)
        page.get_by_label("start recording").first.click()  # named so still, it stops
        page.get_by_label("Trim video to selection").wait_for()
        page.get_by_role("button", name="Add these clips").click()
        page.get_by_text("Click to Access Webcam").first.wait_for()
        page.locator("#classes", has_text="wave").wait_for()
        assert "wave 0 1" in rows(page)
