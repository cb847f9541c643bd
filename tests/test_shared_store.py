"""A store that machines share keeps the promises of a folder: in memory, and in S3 by a server on this machine."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdnb import store
from kdnb.store import artifact, find_fault, read_json, share, store_root

fresh = count()


@pytest.fixture(scope="module")
def s3():
    "A server, and the environment that leads there."
    from moto.server import ThreadedMotoServer  # seconds, so not before it is needed

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            env.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "3", "NO_PROXY": "127.0.0.1",
        }.items():
            env.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, monkeypatch):
    "An empty shared store."
    root = "memory:/" if request.param == "memory" else request.getfixturevalue("s3")
    monkeypatch.setenv("KDNB_STORE", f"{root}/lab-{next(fresh)}")
    return os.environ["KDNB_STORE"]


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setenv("KDNB_STORE", f"memory://lab-{next(fresh)}")
    return os.environ["KDNB_STORE"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    "Move to a machine: a folder of its own, and nothing verified yet."

    def move(name):
        monkeypatch.setenv("KDNB_CACHE", str(tmp_path / name))
        monkeypatch.setattr(store, "_sound", set())

    move("one")
    return move


def build(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"precious data" * 1000)
    (folder / "deep" / "er" / "b.bin").write_bytes(b"")


def never(folder):
    pytest.fail("built again")


def objects(url) -> dict[str, bytes]:
    "Everything in a shared store, by its address below the URL."
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def put(url, name, content: bytes):
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/{name}", content)


def tree(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(*args, **kwargs):
    raise PermissionError("Access Denied")


# --- the same as a folder -----------------------------------------------------------------------


def test_second_machine_reads_what_the_first_built(url, machine, monkeypatch, tmp_path):
    first = artifact("s", {"n": 1}, build)
    machine("two")
    second = artifact("s", {"n": 1}, never)
    assert (first.built, second.built, second.path) == (True, False, tmp_path / "two" / "s" / first.key)
    assert (first.key, first.wall_s) == (second.key, second.wall_s)
    assert tree(first.path) == tree(second.path)
    assert objects(url) == {f"s/{first.key}/{name}": content for name, content in tree(first.path).items()}
    assert [p.name for p in sorted(second.path.parent.iterdir())] == [first.key, f"{first.key}.lock"]
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "folder"))
    plain = artifact("s", {"n": 1}, build)
    assert plain.key == first.key
    varies = {"wall_s", "seal"}
    for name, content in tree(plain.path).items():
        if name != "manifest.json":
            assert tree(second.path)[name] == content
    assert [{k: v for k, v in read_json(a.path / "manifest.json").items() if k not in varies} for a in (plain, second)] == [
        {k: v for k, v in read_json(first.path / "manifest.json").items() if k not in varies}
    ] * 2


def test_what_is_on_the_machine_is_read_without_the_shared_store(memory, machine, monkeypatch):
    artifact("s", {}, build)
    monkeypatch.setenv("KDNB_STORE", "nowhere://lab")
    assert not artifact("s", {}, never).built


def test_damage_on_the_machine_is_mended_from_the_shared_store(memory, machine, caplog):
    made = artifact("s", {}, build)
    (made.path / "a.bin").write_bytes(b"another size")
    assert not artifact("s", {}, never).built  # fetched, not built
    assert find_fault(made.path) == ""
    assert caplog.messages == [f"artifact s/{made.key[:12]}: a.bin is missing or has another size; set aside as .corrupt-1 and fetched or made again"]


def test_every_download_is_verified(memory, machine):
    made = artifact("s", {}, build)
    whole = (made.path / "a.bin").read_bytes()
    for change, built in ((bytes, False), (flip, True)):  # twice in one process
        (made.path / "a.bin").unlink()
        put(memory, f"s/{made.key}/a.bin", change(whole))
        assert artifact("s", {}, build).built == built
        assert (made.path / "a.bin").read_bytes() == whole


def test_a_folder_needs_no_fsspec(tmp_path):
    script = """
        import sys
        from kdnb.store import artifact, store_root
        made = artifact("s", {}, lambda folder: (folder / "data").write_text("data"))
        print(made.built, made.path.parent.parent == store_root(), store_root(), "fsspec" in sys.modules)
    """
    for home in (tmp_path / "plain", f"file://{tmp_path}/url"):
        env = {**os.environ, "KDNB_STORE": str(home), "KDNB_CACHE": "not used"}
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True, timeout=30)
        assert done.stdout == f"True True {str(home).removeprefix('file://')} False\n"


def test_the_machines_folder(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KDNB_CACHE", raising=False)
    assert store_root() == tmp_path / "kdnb"
    monkeypatch.setenv("KDNB_CACHE", str(tmp_path / "fast"))
    assert store_root() == tmp_path / "fast"
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KDNB_CACHE", str(tmp_path / "file" / "store"))
    with pytest.raises(ValueError, match=r"KDNB_CACHE must be a folder that can be written, got .*/file/store/s \(Not a directory\); choose another"):
        artifact("s", {}, build)


# --- damage -------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    return content[:5] + bytes([content[5] ^ 1]) + content[6:]


DAMAGE = {
    "flipped": ("a.bin", flip, "a.bin does not match its checksum"),
    "short": ("a.bin", lambda content: content[:-1], "a.bin is missing or has another size"),
    "manifest flipped": ("manifest.json", flip, "manifest.json is not as written"),
    "manifest truncated": ("manifest.json", lambda content: content[: len(content) // 2], "manifest.json is not as written"),
    "manifest empty": ("manifest.json", lambda content: b"", "manifest.json is not as written"),
}


@pytest.mark.parametrize(("url", "damage"), [*(("memory", d) for d in DAMAGE), ("s3", "flipped"), ("s3", "manifest truncated")], indirect=["url"])
def test_damage_is_set_aside_and_repaired(url, machine, caplog, damage):
    name, change, fault = DAMAGE[damage]
    key = artifact("s", {}, build).key
    before = objects(url)
    damaged = change(before[f"s/{key}/{name}"])
    put(url, f"s/{key}/{name}", damaged)
    machine("two")
    assert artifact("s", {}, build).built
    machine("three")
    third = artifact("s", {}, never)
    assert find_fault(third.path) == ""
    assert caplog.messages == [f"shared artifact s/{key[:12]}: {fault}; set aside as .corrupt-1 and made again"]
    after = objects(url)
    assert after.pop(f"s/{key}.corrupt-1/{name}") == damaged
    assert {k for k in after if "corrupt" not in k} == set(before)
    assert after[f"s/{key}/a.bin"] == before[f"s/{key}/a.bin"]
    assert len(after) == 2 * len(before) - 1


def test_lost_file_and_second_damage(memory, machine, caplog):
    key = artifact("s", {}, build).key
    fs = fsspec.filesystem("memory")
    for n in (1, 2):
        fs.rm_file(f"{memory}/s/{key}/deep/er/b.bin")
        machine(f"heir {n}")
        assert artifact("s", {}, build).built
        assert caplog.messages[n - 1] == f"shared artifact s/{key[:12]}: deep/er/b.bin is missing or has another size; set aside as .corrupt-{n} and made again"
    assert len(caplog.messages) == 2


def test_where_nothing_can_be_moved_damage_is_overwritten(memory, machine, caplog, monkeypatch):
    key = artifact("s", {}, build).key
    put(memory, f"s/{key}/a.bin", b"damaged")
    monkeypatch.setattr(MemoryFileSystem, "mv", refused)
    machine("two")
    assert artifact("s", {}, build).built
    machine("three")
    assert not artifact("s", {}, never).built
    assert caplog.messages == [f"shared artifact s/{key[:12]}: a.bin is missing or has another size; not set aside (PermissionError: Access Denied) and made again"]


@pytest.mark.parametrize("name", ["../../../up.bin", "/etc/kdnb", "deep/../../up.bin"])
def test_manifest_that_leaves_its_folder_is_refused(memory, machine, tmp_path, name):
    made = artifact("s", {}, build)
    manifest = read_json(made.path / "manifest.json")
    del manifest["seal"]
    manifest["files"] |= {name: {"bytes": 1, "sha256": "0"}}
    put(memory, f"s/{made.key}/manifest.json", json.dumps({**manifest, "seal": store.seal(manifest)}).encode())
    machine("two")
    with pytest.raises(ValueError, match=f"{memory} .*ValueError: manifest.json names {name}, which is outside its artifact"):
        artifact("s", {}, build)
    assert [p.suffix for p in (tmp_path / "two" / "s").iterdir()] == [".lock"]


# --- crashes and company ------------------------------------------------------------------------

DIES = """
    import os, signal, sys
    from s3fs import S3FileSystem
    from kdnb.store import artifact
    whole = getattr(S3FileSystem, sys.argv[1])
    async def last(self, *args, **kwargs):
        await whole(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    def build(folder):
        (folder / "one").write_bytes(b"1" * 10)
        (folder / "two").write_bytes(b"2" * 10)
    setattr(S3FileSystem, sys.argv[1], last)
    print(artifact("s", {}, build).built)
"""


def two_files(folder):
    (folder / "one").write_bytes(b"1" * 10)
    (folder / "two").write_bytes(b"2" * 10)


def dies(method) -> int:
    "A process on this machine that is killed as soon as it has done something once."
    return subprocess.run([sys.executable, "-c", textwrap.dedent(DIES), method], timeout=60).returncode


def test_writer_killed_between_files_leaves_nothing_visible(s3, machine, monkeypatch, tmp_path):
    url = f"{s3}/killed-writer"
    monkeypatch.setenv("KDNB_STORE", url)
    assert dies("_put_file") == -signal.SIGKILL
    key = store.Recipe("s", {}, never).key
    assert objects(url) == {f"s/{key}/one": b"1" * 10}  # a part, and no manifest
    assert not artifact("s", {}, never).built  # its own machine has the whole
    machine("two")
    assert artifact("s", {}, two_files).built
    machine("three")
    assert tree(artifact("s", {}, never).path).keys() == {"manifest.json", "one", "two"}
    assert objects(url).keys() == {f"s/{key}/{name}" for name in ("manifest.json", "one", "two")}


def test_reader_killed_between_files_leaves_nothing_visible(s3, machine, monkeypatch, tmp_path):
    monkeypatch.setenv("KDNB_STORE", f"{s3}/killed-reader")
    key = artifact("s", {}, two_files).key
    machine("two")
    assert dies("_get_file") == -signal.SIGKILL
    half = [p for p in (tmp_path / "two" / "s").iterdir() if p.suffix != ".lock"]
    assert [p.name.split("-")[0] for p in half] == [f"{key}.tmp"]
    assert tree(half[0]).keys() == {"manifest.json"}
    made = artifact("s", {}, never)
    assert tree(made.path).keys() == {"manifest.json", "one", "two"}
    assert not half[0].exists()


def test_two_machines_at_once_do_no_harm(url, machine, tmp_path):
    def slow(folder):
        "While this machine builds, another builds the same and is faster."
        machine("fast")
        assert artifact("s", {}, build).built
        machine("one")
        build(folder)

    slower = artifact("s", {}, slow)
    assert slower.built
    fast = tmp_path / "fast" / "s" / slower.key
    assert objects(url) == {f"s/{slower.key}/{name}": content for name, content in tree(fast).items()}
    machine("three")
    third = artifact("s", {}, never)
    assert {k: v for k, v in tree(third.path).items() if k != "manifest.json"} == {k: v for k, v in tree(slower.path).items() if k != "manifest.json"}


def test_old_listings_are_not_believed(s3, machine, monkeypatch):
    monkeypatch.setenv("KDNB_STORE", f"{s3}/listed")
    key = artifact("s", {}, build).key
    address = f"bucket/listed/s/{key}"
    assert len(fsspec.filesystem("s3").ls(address)) == 3  # and remembered
    fsspec.filesystem("s3", skip_instance_cache=True).rm_file(f"{address}/manifest.json")  # by somebody else
    machine("two")
    assert artifact("s", {}, build).built
    machine("three")
    assert not artifact("s", {}, never).built


# --- what cannot be reached ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "why"),
    [
        pytest.param("nowhere://lab", r"ValueError: Protocol not known: nowhere", id="protocol"),
        pytest.param("s3://bucket/lab", r"EndpointConnectionError: Could not connect to the endpoint URL: .http://127\.0\.0\.1:1/bucket/.*", id="address"),
    ],
)
def test_unreachable_store_is_one_sentence(s3, machine, monkeypatch, tmp_path, home, why):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("KDNB_STORE", home)
    fsspec.filesystem("s3").clear_instance_cache()
    told = rf"^KDNB_STORE must be a folder or the URL of a store that can be read, got {home} \({why}\); KDNB_STORE={tmp_path}/one works without it$"
    with pytest.raises(ValueError, match=told):
        artifact("s", {}, never)
    assert [p.suffix for p in (tmp_path / "one" / "s").iterdir()] == [".lock"]
    fsspec.filesystem("s3").clear_instance_cache()


def test_failed_upload_keeps_the_result_and_is_made_up_for(memory, machine, caplog, monkeypatch, tmp_path):
    with monkeypatch.context() as readonly:
        readonly.setattr(MemoryFileSystem, "put_file", refused)
        made = artifact("s", {}, build)
        with pytest.raises(ValueError, match=r"KDNB_STORE must be a folder or the URL of a store that can be written, got memory://lab-\d+ \(PermissionError: Access Denied\); KDNB_STORE="):
            share()
    assert made.built
    assert not artifact("s", {}, never).built
    why = f"KDNB_STORE must be a folder or the URL of a store that can be written, got {memory} (PermissionError: Access Denied); KDNB_STORE={tmp_path}/one works without it"
    assert caplog.messages == [f"artifact s/{made.key[:12]} is on this machine alone until share() uploads it: {why}"]
    assert objects(memory) == {}
    share()
    machine("two")
    assert not artifact("s", {}, never).built


def test_read_only_web_server_is_a_store(machine, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "home"))
    shared = artifact("s", {"n": 1}, build)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=tmp_path / "home")) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        home = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("KDNB_STORE", home)
        read, built = artifact("s", {"n": 1}, never), artifact("s", {"n": 2}, build)
        (shared.path / "a.bin").write_bytes(b"damaged")
        machine("two")
        again = artifact("s", {"n": 1}, build)
        server.shutdown()
        thread.join()
    assert (read.built, built.built, again.built) == (False, True, True)
    assert tree(read.path).keys() == tree(again.path).keys()
    refusal, damage = caplog.messages
    assert refusal.startswith(f"artifact s/{built.key[:12]} is on this machine alone until share() uploads it: KDNB_STORE must be a folder or the URL of a store that can be written, got {home} (")
    # fsspec's web file system cannot move or write, and says so with an error that has no text: the damage is reported with it, and nothing of ours is left to be done
    assert damage == f"shared artifact s/{read.key[:12]}: a.bin is missing or has another size; not set aside (NotImplementedError: ) and made again"


def test_share_uploads_what_is_sound(memory, machine, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KDNB_STORE", str(tmp_path / "one"))  # before anything was shared
    good, bad = (artifact("s", {"n": n}, build) for n in (1, 2))
    (bad.path / "a.bin").write_bytes(b"short")
    artifact("s", {"n": 2}, build)  # the damaged one is now set aside
    lost = artifact("s", {"n": 3}, build)
    (lost.path / "a.bin").unlink()
    shutil.copytree(good.path, f"{good.path}.tmp-1")  # all written, and not yet named
    monkeypatch.setenv("KDNB_STORE", memory)
    share()
    assert {path.split("/")[1] for path in objects(memory)} == {good.key, bad.key}


def test_share_needs_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("KDNB_STORE", str(tmp_path))
    with pytest.raises(ValueError, match=f"KDNB_STORE must be the URL of a shared store, got '{tmp_path}'"):
        share()
