"""Tables of measured times, on imitations of a GPU's clock; files and processes are real."""

import json
import math
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from sparsekit_kernels import tuning
from sparsekit_kernels.tuning import Candidate, Key, Measured

DEVICE = torch.device("cuda:0")
KEY = Key("semi24", "bfloat16", 4096, 14336, 256)
BUCKETS = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Measuring is allowed, in a cache of its own; a call takes as many seconds as it returns. Lists what was timed."""
    timed = []

    def time_call(call):
        timed.append(call)
        return call()

    monkeypatch.setattr(tuning, "may_measure", lambda device: not tuning.is_switched_off())
    monkeypatch.setattr(tuning, "_timer", lambda device: time_call)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Imaginary GPU")
    monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "CONFIG_DIR", tmp_path / "configs")
    monkeypatch.setattr(tuning, "CHECKS", {})  # the configs here are no launches of real kernels
    tuning._shipped.cache_clear()
    tuning._warn_of_unwritable_cache.cache_clear()
    yield timed
    tuning._shipped.cache_clear()


def taking(**us):
    """Candidates that take so many microseconds."""
    return lambda: [Candidate(kernel, [lambda t=t: t * 1e-6]) for kernel, t in us.items()]


def refuse():
    raise AssertionError("nothing should be measured")


def files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_buckets():
    for M in [*range(1, 2000), 2048, 2049, 4097, 6144, 6145, 8191, 8192]:
        assert tuning.bucket(M) == min(bucket for bucket in BUCKETS if bucket >= M), M
    assert tuning.bucket(8193) == tuning.bucket(10**6) == 8192
    assert tuning.key("semi24", torch.float16, 3, 5, 100) == ("semi24", "float16", 3, 5, 128)


class TestMeasure:
    def test_median_in_turns(self, clock):
        times = {"a": iter([9e-6] * 3 + [1e-6, 5e-6, 3e-6]), "b": iter([9e-6] * 3 + [2e-6, 2e-6, 8e-6])}
        calls = {name: (lambda values=values: next(values)) for name, values in times.items()}
        candidates = [Candidate(name, [call]) for name, call in calls.items()]
        assert tuning.measure(candidates, DEVICE, rounds=3, warmup=3) == pytest.approx([3, 2])
        a, b = calls.values()
        assert clock == [a, b, b, a, a, b]

    def test_copies_rotate(self, clock):
        seen = []
        copies = [lambda i=i: seen.append(i) or 1e-6 for i in range(3)]
        tuning.measure([Candidate("a", copies)], DEVICE, rounds=5, warmup=2)
        assert seen == [0, 1, 0, 1, 2, 0, 1]

    def test_time_is_limited_to_three_rounds_and_a_deadline(self, clock):
        tuning.measure(taking(a=1)(), DEVICE, rounds=50, max_seconds=0)
        assert len(clock) == 3

    @pytest.mark.parametrize("candidates", [[], [Candidate("a", [])]])
    def test_nothing_to_measure(self, candidates, clock):
        with pytest.raises(ValueError, match="nothing to measure in"):
            tuning.measure(candidates, DEVICE)


class TestMayMeasure:
    @pytest.fixture(autouse=True)
    def capture(self, monkeypatch):
        state = {"capturing": False}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
        monkeypatch.delenv("SPARSEKIT_TUNING", raising=False)
        return state

    def test_on_a_gpu(self):
        assert tuning.may_measure(torch.device("cuda:0"))

    def test_not_without(self):
        assert not tuning.may_measure(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="cannot measure on cpu now"):
            tuning.measure(taking(a=1)(), torch.device("cpu"))

    def test_not_while_capturing(self, capture):
        capture["capturing"] = True
        assert not tuning.may_measure(torch.device("cuda"))

    def test_not_while_compiling(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not tuning.may_measure(torch.device("cuda"))

    @pytest.mark.parametrize("word", ["off", "OFF", "0"])
    def test_not_when_switched_off(self, word, monkeypatch):
        monkeypatch.setenv("SPARSEKIT_TUNING", word)
        assert not tuning.may_measure(torch.device("cuda"))


class TestChoose:
    def test_measured_once_then_read(self, clock, tmp_path):
        first = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", taking(mma=5, decompress=3, dense=4))
        assert (first.kernel, first.source, str(first)) == ("decompress", "measured", "decompress")
        again = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", refuse)
        assert (again.kernel, again.source) == ("decompress", "cache")
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse).kernel == "mma", "only what is allowed"
        (file,) = files(tmp_path)
        assert file.name == "semi24_bfloat16_4096x14336_M256.json" and file.parent.name.startswith("imaginary-gpu-")
        row, source = tuning.lookup(KEY, DEVICE)
        assert source == "cache" and row == {"mma": Measured(5.0), "decompress": Measured(3.0), "dense": Measured(4.0)}

    def test_other_shapes_are_other_rows(self, clock):
        tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        for other in (
            KEY._replace(M=128), KEY._replace(N=48), KEY._replace(K=48), KEY._replace(dtype="float16"),
            KEY._replace(format="semi24_int8"),
        ):  # fmt: skip
            assert tuning.lookup(other, DEVICE) is None

    def test_the_fastest_config_of_a_kernel_is_kept(self, clock):
        times = {4: 7e-6, 8: 2e-6, 16: 9e-6}
        configs = [Candidate("mma", [lambda w=w: times[w]], {"num_warps": w}) for w in times]
        tuning.choose(KEY, DEVICE, ["mma"], "mma", lambda: configs)
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse) == ("mma", {"num_warps": 8}, "cache", True)
        assert tuning.best_config("mma", KEY, DEVICE) == {"num_warps": 8}
        assert tuning.best_config("dense", KEY, DEVICE) is None

    def test_a_config_that_fails_is_passed_over(self, clock):
        def fail():
            raise RuntimeError("out of registers")

        configs = [Candidate("mma", [fail], {"num_warps": 1}), Candidate("mma", [lambda: 2e-6], {"num_warps": 2})]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choice = tuning.choose(KEY, DEVICE, ["mma"], "mma", lambda: [*configs, *configs[:1]])
        assert choice.config == {"num_warps": 2}

    def test_a_kernel_that_came_later_is_measured_with_the_others(self, clock):
        tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        later = tuning.choose(KEY, DEVICE, ["mma", "cusparselt"], "mma", taking(mma=6, cusparselt=4))
        assert later.kernel == "cusparselt" and tuning.lookup(KEY, DEVICE)[0]["mma"].us == 6

    def test_a_row_is_completed_and_keeps_what_was_tuned(self, clock):
        tuned = {"num_warps": 8}
        before = {
            "mma": Measured(5.0, tuned),
            "decompress": Measured(9.0),
            "old": Measured(7.0),
            "slow": Measured(None),
        }
        for us, config, expected in ((6, {}, Measured(5.0, tuned)), (4, {}, Measured(4.0)), (6, tuned, None)):
            tuning.store(KEY, before, DEVICE)

            def candidates(us=us, config=config):
                found = taking(decompress=8, cusparselt=20, dense=3)()
                return [Candidate("mma", [lambda: us * 1e-6], config), *found]

            choice = tuning.choose(KEY, DEVICE, ["mma", "decompress", "cusparselt", "slow"], "decompress", candidates)
            row, _ = tuning.lookup(KEY, DEVICE)
            expected = expected or Measured(6.0, tuned)
            assert choice == ("mma", expected.config, "measured", True)
            assert row == before | {
                "mma": expected, "decompress": Measured(8.0), "cusparselt": Measured(20.0), "dense": Measured(3.0)
            }  # fmt: skip

    def test_a_tuned_kernel_that_fails_now_is_left_out(self, clock):
        def fail():
            raise RuntimeError("out of registers")

        tuning.store(KEY, {"mma": Measured(5.0, {"num_warps": 8})}, DEVICE)
        with pytest.warns(UserWarning, match="mma cannot run"):
            choice = tuning.choose(
                KEY, DEVICE, ["mma", "a"], "a", lambda: [Candidate("mma", [fail], {"num_warps": 8}), *taking(a=9)()]
            )
        assert choice.kernel == "a" and tuning.lookup(KEY, DEVICE)[0]["mma"] == Measured(None)

    def test_threads_that_meet_a_new_shape_measure_it_once(self, clock):
        together, made, choices = threading.Barrier(2), [], []

        def candidates():
            made.append(threading.get_ident())
            return taking(mma=5, decompress=3)()

        def run():
            together.wait()
            choices.append(tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", candidates))

        with tuning._measuring:  # both have looked it up in vain before either may measure
            threads = [threading.Thread(target=run) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(0.2)
        for thread in threads:
            thread.join()
        assert len(made) == 1 and sorted(choice.source for choice in choices) == ["cache", "measured"]
        assert {choice.kernel for choice in choices} == {"decompress"}

    def test_where_nothing_may_be_measured_the_rule_says_so(self, clock, monkeypatch, tmp_path):
        monkeypatch.setattr(tuning, "may_measure", lambda device: False)
        choice = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", refuse)
        assert choice == ("mma", {}, "rule", False) and "not measured" in str(choice)
        assert files(tmp_path) == []
        tuning.store(KEY, {"decompress": Measured(3.0)}, DEVICE)
        choice = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", refuse)
        assert choice == ("decompress", {}, "cache", False), "half a row is better than a rule"
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse).source == "rule"

    def test_a_kernel_that_fails_is_left_out_and_not_tried_again(self, clock):
        def fail():
            raise RuntimeError("operation not supported")

        def candidates():
            return [*taking(mma=5)(), Candidate("cusparselt", [fail])]

        with pytest.warns(UserWarning, match="cusparselt cannot run .* RuntimeError: operation not supported"):
            assert tuning.choose(KEY, DEVICE, ["mma", "cusparselt"], "mma", candidates).kernel == "mma"
        assert tuning.choose(KEY, DEVICE, ["mma", "cusparselt"], "mma", refuse).kernel == "mma"
        with pytest.raises(RuntimeError, match="no kernel runs .*operation not supported"):
            tuning.choose(KEY._replace(M=1), DEVICE, ["a"], "a", lambda: [Candidate("a", [fail])])

    def test_no_memory_to_measure(self, clock, tmp_path):
        def fail():
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.warns(UserWarning, match="no memory left to measure"):
            choice = tuning.choose(KEY, DEVICE, ["a", "mma"], "mma", lambda: [Candidate("a", [fail])])
        assert choice == ("mma", {}, "rule", True), "not tried again at each call"
        assert files(tmp_path) == []


class TestCache:
    def damage(self, tmp_path, change):
        """Measure, change the file, and see that it is measured again, with a warning, and mended."""
        tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        (file,) = files(tmp_path)
        good = file.read_bytes()
        change(file)
        with pytest.warns(UserWarning, match=f"ignoring the tuning cache {file}, it will be measured again: ") as seen:
            choice = tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        assert choice.source == "measured" and file.read_bytes() == good and files(tmp_path) == [file]
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse).source == "cache"
        return str(seen[0].message)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b"null", b'{"version": 1}', b"\x00" * 500], ids=repr
    )
    def test_garbage(self, content, clock, tmp_path):
        self.damage(tmp_path, lambda file: file.write_bytes(content))

    @pytest.mark.parametrize("length", [1, 100, 200, -3])
    def test_half_a_file(self, length, clock, tmp_path):
        self.damage(tmp_path, lambda file: file.write_bytes(file.read_bytes()[:length]))

    @pytest.mark.parametrize(
        "path,value",
        [
            (["version"], 2),
            (["gpu"], 3),
            (["rows"], [3]),
            (["rows", 0, "M"], 255),
            (["rows", 0, "N"], -1),
            (["rows", 0, "N"], 4096.0),
            (["rows", 0, "K"], True),
            (["rows", 0, "dtype"], None),
            (["rows", 0, "kernels"], []),
            (["rows", 0, "kernels", "mma"], 5),
            (["rows", 0, "kernels", "mma", "us"], "5"),
            (["rows", 0, "kernels", "mma", "us"], 0),
            (["rows", 0, "kernels", "mma", "us"], math.nan),
            (["rows", 0, "kernels", "mma", "us"], math.inf),
            (["rows", 0, "kernels", "mma", "config"], [1]),
            (["rows", 0, "kernels", "mma", "config"], {"num_warps": [4]}),
        ],
        ids=str,
    )
    def test_wrong_content(self, path, value, clock, tmp_path):
        def change(file):
            document = json.loads(file.read_text())
            place = document
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
            file.write_text(json.dumps(document))

        self.damage(tmp_path, change)

    @pytest.mark.parametrize("what", ["gpu", "torch", "triton", "cuda", "cusparselt", "kernels"])
    def test_files_of_others(self, what, clock, tmp_path):
        def change(file):
            document = json.loads(file.read_text())
            (document if what == "gpu" else document["measured_with"])[what] = "another"
            file.write_text(json.dumps(document))

        assert "it was measured on" in self.damage(tmp_path, change)

    def test_every_version_has_its_own_folder(self, clock, monkeypatch, tmp_path):
        tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        versions = {**tuning.versions(), "torch": "99"}
        monkeypatch.setattr(tuning, "versions", lambda: versions)
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5)).source == "measured"
        assert len({file.parent for file in files(tmp_path)}) == 2

    def test_a_folder_that_cannot_be_written_warns_once(self, clock, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path / "file" / "folder"))
        with pytest.warns(UserWarning, match="cannot be written .*each process measures again") as seen:
            for M in (1, 2, 4):
                choice = tuning.choose(KEY._replace(M=M), DEVICE, ["mma"], "mma", taking(mma=5))
                assert choice.source == "measured"
        assert len([one for one in seen if "cannot be written" in str(one.message)]) == 1

    def test_a_failed_write_leaves_nothing(self, clock, monkeypatch, tmp_path):
        def fail(source, target):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.warns(UserWarning, match="disk full"):
            tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_switched_off_reads_and_writes_no_file(self, clock, monkeypatch, tmp_path):
        tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5))
        monkeypatch.setenv("SPARSEKIT_TUNING", "off")
        assert tuning.choose(KEY, DEVICE, ["mma"], "decompress", refuse) == ("decompress", {}, "rule", True)
        tuning.store(KEY._replace(M=1), {"mma": Measured(1.0)}, DEVICE)
        assert len(files(tmp_path)) == 1 and tuning.against_dense(*KEY[:1], torch.bfloat16, *KEY[2:4], DEVICE) == []

    def test_default_places(self, clock, monkeypatch, tmp_path):
        monkeypatch.delenv("SPARSEKIT_TUNING")
        monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "a"))
        assert tuning._cache_folder("NVIDIA H200").parent == tmp_path / "a" / "tuning"
        monkeypatch.delenv("SPARSEKIT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
        folder = tuning._cache_folder("NVIDIA H200")
        assert folder.parent == tmp_path / "b" / "sparsekit" / "tuning" and folder.name.startswith("nvidia-h200-")

    def test_processes_that_write_the_same_row(self, clock, monkeypatch, tmp_path):
        """Two processes write as fast as they can, this one reads: every file seen is whole and one of theirs."""
        monkeypatch.setattr(tuning, "versions", lambda: {})
        script = (
            "import sys, torch; from sparsekit_kernels import tuning\n"
            "tuning.versions = lambda: {}; tuning.gpu_name = lambda device: 'Imaginary GPU'\n"
            f"key = tuning.Key(*{tuple(KEY)!r})\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "for _ in range(60):\n"
            "    row = {'mma': tuning.Measured(float(sys.argv[1]), {'pad': 'x' * 20000})}\n"
            "    tuning.store(key, row, torch.device('cuda:0'))\n"
        )
        env = {**os.environ, "PYTHONPATH": str(Path(tuning.__file__).parent.parent)}
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", script, us], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for us in ("3", "7")
        ]
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        seen = set()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            while any(writer.poll() is None for writer in writers):
                found = tuning.lookup(KEY, DEVICE)
                if found is not None:
                    seen.add(found[0]["mma"].us)
        assert [writer.wait() for writer in writers] == [0, 0]
        assert seen and seen <= {3.0, 7.0} and tuning.lookup(KEY, DEVICE)[0]["mma"].us in seen
        assert len(list((tmp_path / "cache").rglob("*.*"))) == 1, "no half-written files stay behind"


class TestConfigsThatAreNone:
    """Of kernels that say what they can be launched with."""

    @pytest.fixture(autouse=True)
    def check(self, clock, monkeypatch):
        def check(key, config):
            if set(config) != {"num_warps"}:
                raise TypeError("unexpected keyword")
            if config["num_warps"] not in (1, 2, 4, 8):
                raise ValueError("num_warps is no power of two")

        monkeypatch.setattr(tuning, "CHECKS", {"mma": check})
        tuning._warn_of_unsound_row.cache_clear()

    @pytest.mark.parametrize("config", [{"warps": 4}, {"num_warps": 3}, {"num_warps": 0}, {"num_warps": 4, "a": 1}])
    def test_in_the_cache_are_replaced(self, config, tmp_path):
        tuning.store(KEY, {"mma": Measured(1.0, config), "decompress": Measured(2.0)}, DEVICE)
        with pytest.warns(UserWarning, match="ignoring what .*M256.json says of .*mma cannot be launched with") as seen:
            assert tuning.known(KEY, DEVICE, ["mma", "decompress"], "mma") == ("mma", {}, "rule", False)
            assert tuning.best_config("mma", KEY, DEVICE) is None
            assert tuning.against_dense("semi24", torch.bfloat16, KEY.N, KEY.K, DEVICE) == []
            choice = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", taking(mma=5, decompress=3))
        assert len(seen) == 1 and (choice.kernel, choice.source) == ("decompress", "measured")
        assert tuning.lookup(KEY, DEVICE) == ({"mma": Measured(5.0), "decompress": Measured(3.0)}, "cache")

    def test_in_a_shipped_table_are_ignored(self, monkeypatch, tmp_path):
        rows = {KEY: {"mma": Measured(1.0, {"WARPS": 4})}}
        tuning._write(tmp_path / "configs" / "imaginary-gpu.json", tuning._document("Imaginary GPU", {}, rows))
        with pytest.warns(UserWarning, match="ignoring what .*imaginary-gpu.json says") as seen:
            monkeypatch.setenv("SPARSEKIT_TUNING", "off")
            for _ in range(3):
                assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse) == ("mma", {}, "rule", True)
        assert len(seen) == 1
        monkeypatch.delenv("SPARSEKIT_TUNING")
        monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "home"))
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5)).source == "measured"
        assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse).source == "cache"

    def test_a_good_one_and_none_pass(self):
        for config in ({}, {"num_warps": 4}):
            tuning.store(KEY, {"mma": Measured(1.0, config), "other": Measured(2.0, {"any": 3})}, DEVICE)
            assert tuning.choose(KEY, DEVICE, ["mma"], "mma", refuse) == ("mma", config, "cache", True)


class TestTables:
    def ship(self, tmp_path, name="Imaginary GPU", **rows):
        document = tuning._document(name, {"torch": "2.11.0"}, {KEY: {k: Measured(us) for k, us in rows.items()}})
        tuning._write(tmp_path / "configs" / f"{tuning.slug(name)}.json", document)

    def test_a_shipped_table_is_used_and_the_cache_goes_before_it(self, clock, tmp_path):
        self.ship(tmp_path, mma=5.0, decompress=3.0)
        choice = tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", refuse)
        assert (choice.kernel, choice.source) == ("decompress", "table")
        tuning.store(KEY, {"mma": Measured(2.0), "decompress": Measured(3.0)}, DEVICE)
        assert tuning.choose(KEY, DEVICE, ["mma", "decompress"], "mma", refuse).kernel == "mma"

    def test_a_damaged_table_is_spoken_of(self, clock, tmp_path):
        self.ship(tmp_path, mma=5.0)
        (tmp_path / "configs" / "imaginary-gpu.json").write_text("{")
        with pytest.warns(UserWarning, match="ignoring the shipped table"):
            assert tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5)).source == "measured"

    def test_export_makes_a_table(self, clock, tmp_path):
        for M in (1, 128):
            tuning.choose(KEY._replace(M=M), DEVICE, ["mma"], "mma", taking(mma=M, dense=5))
        tuning.store(KEY._replace(format="cusparselt-search"), {"cusparselt": Measured(None, {"alg_id": 3})}, DEVICE)
        assert tuning.export(DEVICE, tmp_path / "configs" / "imaginary-gpu.json") == 2, (
            "a search is of one version only"
        )
        gpu, measured_with, rows = tuning.read_table(tmp_path / "configs" / "imaginary-gpu.json")
        assert gpu == "Imaginary GPU" and measured_with == tuning.versions()
        assert {key.M: row["mma"].us for key, row in rows.items()} == {1: 1.0, 128: 128.0}

    def test_against_dense(self, clock, tmp_path):
        asked = ("semi24", torch.bfloat16, KEY.N, KEY.K, DEVICE)
        assert tuning.against_dense(*asked) == []
        self.ship(tmp_path, mma=50.0, dense=40.0)
        tuning._shipped.cache_clear()
        tuning.store(
            KEY._replace(M=64), {"mma": Measured(10.0), "cusparselt": Measured(8.0), "dense": Measured(16.0)}, DEVICE
        )
        tuning.store(KEY._replace(M=8), {"mma": Measured(10.0), "cusparselt": Measured(None)}, DEVICE)
        small, large = tuning.against_dense(*asked)
        assert small == (64, "cusparselt", 8.0, 16.0) and small.speedup == 2
        assert large == (256, "mma", 50.0, 40.0) and large.speedup == 0.8
        assert tuning.against_dense(*asked, allowed=["mma"])[0].speedup == 1.6

    def test_slugs(self):
        assert tuning.slug("NVIDIA H200") == "nvidia-h200"
        assert tuning.slug("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == "nvidia-h100-80gb-hbm3-mig-1g-10gb"


def assert_whole(path):
    """What a table must be to be shipped."""
    gpu, measured_with, rows = tuning.read_table(path)
    assert path.name == f"{tuning.slug(gpu)}.json" and rows
    assert {"torch", "triton", "cuda", "cusparselt", "kernels"} <= set(measured_with)
    for key, row in rows.items():
        assert "dense" in row and any(entry.us is not None for entry in row.values()), key
        assert tuning._is_sound(key, row, path)


def test_shipped_tables_are_whole(clock, tmp_path):
    for path in (Path(tuning.__file__).parent / "configs").glob("*.json"):
        assert_whole(path)
    tuning.choose(KEY, DEVICE, ["mma"], "mma", taking(mma=5, dense=7))
    tuning.export(DEVICE, tmp_path / "configs" / "imaginary-gpu.json")
    assert_whole(tmp_path / "configs" / "imaginary-gpu.json")
    tuning.store(KEY, {"mma": Measured(5.0)}, DEVICE)
    tuning.export(DEVICE, tmp_path / "configs" / "imaginary-gpu.json")
    with pytest.raises(AssertionError, match="dense"):
        assert_whole(tmp_path / "configs" / "imaginary-gpu.json")


def test_versions_know_the_sources():
    versions = tuning.versions()
    assert versions["torch"] == torch.__version__ and len(versions["kernels"]) == 16
