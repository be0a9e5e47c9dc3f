"""Slides and outputs in an object store: the same bits as on a disk, whatever happens on the way; errors by name."""

import io
import json
import multiprocessing
import os
import pickle
import random
import sys
import time
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from pyarrow import parquet

from cellseg_batch.engine.errors import UsageError
from cellseg_batch.engine.run.campaign import run as run_campaign
from cellseg_batch.engine.settings import Settings
from cellseg_batch.engine.storage import lock, object_stores
from cellseg_batch.engine.storage.journal import Journal
from cellseg_batch.engine.storage.lock import BusyError, Locks
from cellseg_batch.engine.storage.object_stores import StoreError
from cellseg_batch.engine.storage.paths import RemotePath, locate, zarr_store
from tests.support.bucket import ENVIRONMENT, SECRET, Server, download, make_bucket, upload
from tests.support.images import blobs, labels_of, write_ome_zarr
from tests.support.watcher import Watcher

SEED = int(os.environ.get("CELLSEG_CHAOS_SEED", "7"))


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def fresh():
    """No clients of other tests' environments, and none left for others."""

    def forget():
        object_stores.client_of.cache_clear()
        object_stores._credentials.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def bucket(server, fresh, monkeypatch, request):
    """An empty bucket; the environment is that of a user who has credentials."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    return make_bucket(f"bucket-{abs(hash(request.node.name))}")


@pytest.fixture
def slide(tmp_path):
    return write_ome_zarr(tmp_path / "slide.zarr", blobs(300, 260), levels=2, chunk=100)


@pytest.fixture
def impatient(monkeypatch):
    """A store that does not answer is given up at once."""
    monkeypatch.setattr(object_stores, "_MAX_RETRIES", 1)


def pixels_of(store):
    """Path -> pixels of every array below a store."""
    group = zarr.open_group(zarr_store(store), mode="r")
    return {name: node[...] for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def assert_same_pixels(store, other):
    expected, found = pixels_of(store), pixels_of(other)
    assert expected.keys() == found.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels, err_msg=name)


def test_a_place_is_named_by_a_url_or_a_path(tmp_path):
    assert locate("file:///tmp/a%20b") == locate("/tmp/a b")
    place = locate("s3://bucket/plates/a.zarr")
    assert isinstance(place, RemotePath)
    assert str(place / "A" / "1") == "s3://bucket/plates/a.zarr/A/1"
    assert str(place.with_name("b.zarr")) == "s3://bucket/plates/b.zarr"
    assert (place.bucket, place.key, place.parent.parent.key) == ("bucket", "plates/a.zarr", "")
    assert (place / "A").relative_to(place).as_posix() == "A"
    assert (place / "../b").resolve() == locate("s3://bucket/plates/b")
    with pytest.raises(TypeError, match="does not lie on this machine"):
        place.open()
    for url in ("ftp://host/a.zarr", "s3:///a.zarr"):
        with pytest.raises(UsageError, match="URL such as s3://bucket"):
            locate(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(UsageError, match="without credentials") as error:
        locate(f"https://me:{SECRET}@host/a.zarr")
    assert SECRET not in str(error.value)


def test_objects_are_looked_at_like_files(bucket):
    store = bucket / "a.zarr"
    assert not store.exists()
    for name in ("zarr.json", "0/c/1", "journal/0/1.json", "journal/0/2.json"):
        (store / name).write(name.encode())
    assert (store.exists(), store.is_dir(), store.is_file()) == (True, True, False)
    assert ((store / "zarr.json").is_file(), (store / "zarr.json").is_dir()) == (True, False)
    assert {path.name for path in store.iterdir()} == {"zarr.json", "0", "journal"}
    assert {path.name for path in (store / "journal").glob("*/*.json")} == {"1.json", "2.json"}
    assert {path.name for path in store.glob("*.json")} == {"zarr.json"}
    assert {path.name for path in store.rglob("*.json")} == {"zarr.json", "1.json", "2.json"}
    assert abs((store / "zarr.json").stat().st_mtime - time.time()) < 3600
    with (store / "0/c/1").reader() as stream:
        assert stream.seek(-3, os.SEEK_END) == 2
        assert (stream.read(), stream.read()) == (b"c/1", b"")
    (bucket / "a.zarr.cellseg").write(b"")
    (store / "zarr.json").unlink()
    store.remove_tree()
    assert not store.exists()
    assert (bucket / "a.zarr.cellseg").exists(), "it only begins with the same letters"
    with pytest.raises(FileNotFoundError):
        (store / "zarr.json").read_bytes()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_run_in_a_bucket_leaves_what_a_run_on_disk_leaves(tmp_path, bucket, segment, version):
    path = write_ome_zarr(tmp_path / "slide.zarr", blobs(200, 180), levels=2, chunk=100, version=version)
    place = upload(path, bucket)
    wanted = {"objects": True, "probability": True}
    here, there = segment(path, **wanted), segment(place, **wanted)
    assert (there.status, there.slides[0].objects) == ("done", here.slides[0].objects)
    assert there.slides[0].labels == f"{place}/labels/cellseg"
    assert_same_pixels(path, place)
    assert_same_pixels(tmp_path / "slide.cellseg.zarr", bucket / "slide.cellseg.zarr")
    download(bucket, tmp_path / "copy")
    tables = [
        parquet.read_table(folder / "slide.zarr.cellseg/labels/cellseg/objects.parquet")
        for folder in (tmp_path, tmp_path / "copy")
    ]
    assert tables[0].num_rows > 10
    assert tables[0].equals(tables[1])
    left = [str(path) for path, _ in bucket.written() if path.suffix in (".lock", ".partial") or "scratch" in str(path)]
    assert not left
    assert segment(place, **wanted).slides[0].status == "skipped"


@pytest.mark.parametrize(("remote_input", "remote_output"), [(True, False), (False, True), (True, True)])
def test_outputs_are_mirrored_from_and_to_a_bucket(tmp_path, slide, bucket, segment, remote_input, remote_output):
    expected = labels_of(segment(slide))
    source = upload(write_ome_zarr(tmp_path / "b.zarr", blobs(300, 260), chunk=100), bucket) if remote_input else slide
    output = bucket / "out" if remote_output else tmp_path / "out"
    report = segment(source, output=output)
    labels = zarr.open_group(zarr_store(locate(report.slides[0].labels)), mode="r")
    np.testing.assert_array_equal(labels["0"][...], expected)
    origin = labels.attrs["ome"]["image-label"].get("source", {}).get("image")
    assert origin == ("../../../../b.zarr" if remote_input and remote_output else None)


def test_pictures_and_tiffs_are_read_from_a_bucket(tmp_path, bucket, segment):
    image = np.moveaxis(blobs(120, 100), 0, -1)
    folder = tmp_path / "scans"
    folder.mkdir()
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image).save(folder / "b.tif")
    place = upload(folder, bucket)
    here, there = segment(folder), segment(place)
    assert [one.status for one in there.slides] == ["done", "done"]
    for number in range(2):
        found = zarr.open_array(zarr_store(locate(there.slides[number].labels) / "0"), mode="r")[...]
        np.testing.assert_array_equal(found, labels_of(here, number))


class Files(SimpleHTTPRequestHandler):
    """A web server that says nothing."""

    def log_message(self, *about):
        pass


def test_a_web_server_is_read_and_not_written_to(tmp_path, slide, fresh, segment):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=tmp_path)) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        place = locate(f"http://127.0.0.1:{web.server_port}/slide.zarr")
        report = segment(place, output=tmp_path / "out")
        refused = segment(place)
        web.shutdown()
    np.testing.assert_array_equal(labels_of(report), labels_of(segment(slide)))
    assert "found a web server" in refused.slides[0].reason


def segment_in_child(environment, path, settings):
    os.environ.update(environment)
    run_campaign([path], settings, Watcher())


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path, tiny_model, bucket, server):
    draw = random.Random(SEED)
    print(f"chaos seed {SEED}")
    path = write_ome_zarr(tmp_path / "a.zarr", blobs(250, 250), levels=2, chunk=100)
    place = upload(path, bucket)
    usual = {"model": str(tiny_model), "backend": "torch", "precision": "fp32", "threads": 1, "tile": 64, "block": 64}
    settings = Settings(**usual, objects=True, workers=2)
    run_campaign([path], settings, Watcher())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "cellseg_batch.engine.inference.backends.torch_cpu"])
    journal = Journal(bucket / "a.zarr.cellseg/labels/cellseg")
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}
    for _ in range(3):
        child = context.Process(target=segment_in_child, args=(environment, place, settings))
        child.start()
        enough = len(list(journal.folder.rglob("*.json"))) + draw.randrange(1, 12)
        while child.is_alive() and len(list(journal.folder.rglob("*.json"))) < enough:
            time.sleep(0.1)
        assert not journal.is_finished, "it was to be killed on the way"
        child.kill()
        child.join()
    report = run_campaign([place], settings, Watcher())
    assert report.status == "done"
    assert_same_pixels(path, place)
    table = "a.zarr.cellseg/labels/cellseg/objects.parquet"
    assert parquet.read_table((bucket / table).reader()).equals(parquet.read_table(tmp_path / table))
    assert not (bucket / "a.zarr.cellseg/labels/cellseg.lock").exists()


def test_a_store_that_stumbles_costs_nothing(slide, bucket, segment, server):
    place = upload(slide, bucket)
    with server.stumbling(7, "503 Slow Down", "SlowDown"):
        assert segment(place, instances=True).status == "done"
    segment(slide, instances=True)
    assert_same_pixels(slide, place)


def test_a_store_that_fails_for_good_fails_the_image_until_it_is_back(slide, bucket, segment, server, impatient):
    place = upload(slide, bucket)
    with server.stumbling(3, "500 Broken", "InternalError"):
        report = segment(place, workers=1)
    assert report.status == "failed"
    assert len(report.slides[0].reason) < 500
    assert segment(place).status == "done"
    segment(slide)
    assert_same_pixels(slide, place)


def test_what_is_wrong_is_said_in_one_line(bucket, command, monkeypatch, fresh, impatient, server):
    code, said = command("info", "s3://no-such-bucket/a.zarr")
    assert code == 2
    assert "s3://no-such-bucket/a.zarr: expected an object store that answers, found NoSuchBucket" in said
    code, said = command("run", bucket / "a.zarr")
    assert (code, "found nothing" in said) == (2, True)
    with server.stumbling(1, "403 Forbidden", "InvalidAccessKeyId"):
        code, said = command("status", bucket / "a.zarr")
    assert (code, "found InvalidAccessKeyId (likely credentials" in said, "AWS_PROFILE" in said) == (2, True, True)
    assert SECRET not in said
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fresh()
    code, said = command("plan", bucket / "a.zarr")
    assert (code, "wrong AWS_ENDPOINT_URL" in said) == (2, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fresh()
    code, said = command("verify", bucket / "a.zarr")
    assert (code, "likely credentials that are missing" in said) == (2, True)
    code, said = command("run", "ftp://host/a.zarr")
    assert (code, "a URL such as s3://bucket/slide.zarr" in " ".join(said.replace("│", " ").split())) == (2, True)


def test_without_the_extra_it_is_named(command, monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "obstore", None)
    code, said = command("run", "s3://bucket/a.zarr")
    assert (code, "pip install 'cellseg-batch[s3]'" in said) == (2, True)


def test_the_commands_around_a_run_take_a_bucket(tmp_path, slide, bucket, segment, command):
    place = upload(slide, bucket)
    assert command("info", bucket)[0] == 0
    segment(place, objects=True)
    code, said = command("status", bucket)
    assert (code, "1 image: 1 done" in said) == (0, True)
    code, said = command("verify", place)
    assert (code, "0 damaged" in said) == (0, True)
    assert command("preview", place, "--out", tmp_path / "a.png")[0] == 0
    assert command("report", place, "--out", tmp_path / "a.html")[0] == 0
    assert "data:image/jpeg" in (tmp_path / "a.html").read_text()
    assert command("export-objects", place, "--format", "csv", "--out", tmp_path / "a.csv")[0] == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) > 10
    assert command("export-objects", place, "--format", "ngio")[0] == 0
    assert (place / "tables/cellseg/table.parquet").is_file()
    code, said = command("export-labels", place, "--out", bucket / "a.ome.tif")
    assert code == 0, said
    written = tifffile.imread(io.BytesIO((bucket / "a.ome.tif").read_bytes()))
    np.testing.assert_array_equal(written, zarr.open_array(zarr_store(place / "labels/cellseg/0"), mode="r")[...])
    code, said = command("export-objects", place, "--format", "spatialdata", "--out", tmp_path / "a.zarr")
    assert code == 0, said
    ids = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["tables/table/obs/id"][...]
    assert sorted(ids) == list(range(1, len(ids) + 1))


def test_a_damaged_object_is_found_and_made_again(slide, bucket, segment, command):
    place = upload(slide, bucket)
    segment(place)
    damaged = next(path for path in (place / "labels/cellseg/0/c").rglob("*"))
    damaged.write(damaged.read_bytes()[:-1] + b"\0")
    assert command("verify", place, "--forget")[0] == 1
    assert segment(place).slides[0].status == "done"
    assert command("verify", place)[0] == 0


def test_a_bucket_is_locked_by_one(bucket):
    path, locks = bucket / "a.lock", Locks()
    with locks.hold(path):
        with pytest.raises(BusyError, match="process"), Locks().hold(path):
            pass
        locks.check(path)
    assert not path.exists()


def test_the_lock_of_a_dead_run_is_taken_over_by_one(bucket, monkeypatch):
    path = bucket / "a.lock"
    path.write(json.dumps({"token": "x", "host": "h", "machine": lock._machine(), "pid": 1, "started": 0.0}).encode())
    _, version = path.read_version()
    with Locks().hold(path):
        assert not path.write_if(b"{}", version), "who saw the dead one's lock too comes late"
    other = {"token": "x", "host": "h", "machine": "another", "pid": 1, "started": 0.0}
    path.write(json.dumps(other).encode())
    with pytest.raises(BusyError), Locks().hold(path):
        pass
    with closing(Locks(lease=-1.0)) as locks, locks.hold(path):
        pass


def test_a_sign_of_life_keeps_others_from_a_lock(bucket):
    path, locks = bucket / "a.lock", Locks()
    with locks.hold(path):
        _, version = path.read_version()
        lock._show_life(path, locks._held[path])
        assert not path.write_if(b"{}", version)
        locks.check(path)
        path.write(b"{}")
        with pytest.raises(BusyError):
            locks.check(path)


def test_store_errors_travel_between_processes():
    error = StoreError("s3://b", expected="a", found="b", remedy="c")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.detail) == (str(error), error.detail)
    assert isinstance(copy, OSError)
