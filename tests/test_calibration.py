import copy
import json

import pytest
import torch
from torch import nn

from sparsekit.calibration import ColumnNorms, Hessian, Walk, load_samples
from sparsekit.targets import find_targets
from tests.archs.tiny_models import BUILDERS, tiny_model, token_samples


class Letters:
    """A tokenizer of letters, a = 1, with an end-of-text token."""

    eos_token_id = 60

    def __call__(self, texts, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}


class Pieces(Letters):
    """An encoder's tokenizer, with special tokens."""

    cls_token_id, sep_token_id = 58, 59

    def __call__(self, text, truncation, max_length, return_tensors):
        assert truncation and return_tensors == "pt"
        ids = [58, *[ord(letter) - 96 for letter in text if letter != " "][: max_length - 2], 59]
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}


def rows(samples):
    return [batch["input_ids"].tolist() for batch in samples.batches]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


TEXTS = ["abcdefgh", "ijklmnop", "qrstuvwx"]
STREAM = [*range(1, 9), 60, *range(9, 17), 60, *range(17, 25), 60]


class TestText:
    def test_a_causal_model_reads_random_chunks_of_one_stream(self, llama):
        samples = load_samples(TEXTS, llama, Letters(), num_samples=50, max_length=10)
        assert samples.num_samples == 50
        starts = set()
        for ((*chunk,),) in rows(samples):
            position = next(i for i in range(len(STREAM)) if STREAM[i : i + 10] == chunk)
            starts.add(position)
        assert len(starts) > 10 and max(starts) == len(STREAM) - 10 and min(starts) == 0

    def test_the_seed_decides_and_nothing_else(self, llama):
        torch.manual_seed(1)
        one = load_samples(TEXTS, llama, Letters(), num_samples=8, max_length=10, seed=5)
        before = torch.get_rng_state()
        two = load_samples(TEXTS, llama, Letters(), num_samples=8, max_length=10, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        other = load_samples(TEXTS, llama, Letters(), num_samples=8, max_length=10, seed=6)
        assert rows(one) == rows(two) and one.digest == two.digest
        assert rows(one) != rows(other) and one.digest != other.digest

    def test_chunks_are_no_longer_than_the_model_reads(self, llama):
        samples = load_samples(["abc" * 100], llama, Letters(), num_samples=2, max_length=2048)
        assert [batch["input_ids"].shape for batch in samples.batches] == [(1, 64)] * 2

    def test_an_encoder_reads_single_texts(self):
        model = tiny_model("bert")
        samples = load_samples(["abc", " ", "abcdefghijkl", ""], model, Pieces(), num_samples=5, max_length=8)
        assert rows(samples) == [[[58, 1, 2, 3, 59]], [[58, 1, 2, 3, 4, 5, 6, 59]]]
        few = load_samples(TEXTS * 10, model, Pieces(), num_samples=7, max_length=8, batch_size=4)
        assert [batch["input_ids"].shape[0] for batch in few.batches] == [4, 3]

    def test_an_encoder_batches_equal_lengths_only(self):
        texts = ["ab", "abcd", "ba", "dcba", "aa"]
        samples = load_samples(texts, tiny_model("bert"), Pieces(), batch_size=2)
        assert [batch["input_ids"].shape for batch in samples.batches] == [(2, 4), (1, 4), (2, 6)]

    def test_other_tokenizers(self, llama):
        class Encoder:
            def encode(self, text):
                return type("Encoding", (), {"ids": [ord(letter) - 96 for letter in text]})()

        samples = load_samples(["abcdefgh"], llama, Encoder(), num_samples=1, max_length=8)
        assert rows(samples) == [[[1, 2, 3, 4, 5, 6, 7, 8]]]

    def test_a_stream_without_end(self, llama):
        def forever():
            while True:
                yield {"text": "abcdefgh"}

        assert load_samples(forever(), llama, Letters(), num_samples=3, max_length=16).num_samples == 3
        endless = load_samples(forever(), tiny_model("bert"), Pieces(), num_samples=3, max_length=16)
        assert endless.num_samples == 3

    def test_a_blank_line_is_a_document_of_a_stream(self, llama):
        samples = load_samples(["a", "", "b"], llama, Letters(), num_samples=1, max_length=5)
        assert rows(samples) == [[[1, 60, 60, 2, 60]]]

    @pytest.mark.parametrize(
        "texts,message",
        [
            (["abc"], "gave 4 tokens, and one sample takes 16: pass more text, or a max_seq_length of at most 4"),
            (["", " "], "gave 0 tokens"),
            ([], "dataset is empty"),
            (["abc", 3], "item 1 of the dataset is a int among strings"),
        ],
    )
    def test_too_little_or_wrong_text(self, llama, texts, message):
        with pytest.raises(ValueError, match=message):
            load_samples(texts, llama, Letters(), max_length=16)

    def test_text_needs_a_tokenizer(self, llama):
        with pytest.raises(ValueError, match="needs a tokenizer: pass tokenizer="):
            load_samples(TEXTS, llama)

    def test_blank_texts_are_none_for_an_encoder(self):
        with pytest.raises(ValueError, match="gave 0 tokens"):
            load_samples(["", " "], tiny_model("bert"), Pieces())


class TestTokens:
    def test_tensors_are_used_as_they_are_and_in_order(self, llama):
        tensors = [torch.tensor([1, 2, 3]), torch.tensor([[4, 5]]), torch.tensor([[6, 7], [8, 9]])]
        samples = load_samples(tensors, llama, max_length=2)
        assert rows(samples) == [[[1, 2, 3]], [[4, 5]], [[6, 7], [8, 9]]]
        assert all(batch["input_ids"].dtype == torch.int64 for batch in samples.batches)

    def test_no_more_than_asked_for(self, llama):
        tensors = [torch.full((2, 3), index) for index in range(5)]
        samples = load_samples(tensors, llama, num_samples=5)
        assert rows(samples) == [[[0] * 3] * 2, [[1] * 3] * 2, [[2] * 3]]

    def test_lists_of_numbers_and_one_tensor(self, llama):
        assert rows(load_samples([[1, 2], [3, 4]], llama)) == [[[1, 2]], [[3, 4]]]
        assert rows(load_samples(torch.tensor([[1, 2], [3, 4]]), llama)) == [[[1, 2]], [[3, 4]]]
        assert rows(load_samples(torch.tensor([1, 2]), llama)) == [[[1, 2]]]

    def test_batches_hold_equal_lengths_in_order(self, llama):
        tensors = [torch.full((length,), length) for length in (3, 4, 3, 3, 4)]
        samples = load_samples(tensors, llama, batch_size=2)
        assert rows(samples) == [[[3] * 3] * 2, [[3] * 3], [[4] * 4] * 2]

    def test_what_a_tokenizer_returns_is_one_batch(self, llama):
        from transformers import BatchEncoding

        encoded = BatchEncoding({"input_ids": torch.tensor([[1, 2], [3, 4]])})
        assert rows(load_samples(encoded, llama)) == [[[1, 2], [3, 4]]]

    def test_data_loaders_and_dicts(self, llama):
        data = [{"input_ids": torch.tensor([1, 2, 3]), "attention_mask": torch.tensor([1, 1, 0]), "labels": 1}] * 5
        samples = load_samples(torch.utils.data.DataLoader(data, batch_size=2), llama)
        assert [batch["input_ids"].shape[0] for batch in samples.batches] == [2, 2, 1]
        assert set(samples.batches[0]) == {"input_ids", "attention_mask"}
        assert rows(load_samples([{"input_ids": [1, 2], "text": "ab"}], llama)) == [[[1, 2]]]

    @pytest.mark.parametrize(
        "tensors,message",
        [
            ([torch.tensor([1, 61])], "token ids from 1 to 61, and the model knows 0 to 60"),
            ([torch.tensor([-1, 3])], "token ids from -1 to 3"),
            ([torch.ones(65, dtype=torch.long)], "sample 0 holds 65 tokens, and the model has 64 positions"),
            ([torch.ones(0, dtype=torch.long)], "0 tokens"),
            ([torch.ones(1, 5)], "sample 0 holds torch.float32, and the model reads token ids"),
            ([{"input_ids": torch.ones(1, 5)}], "sample 0 holds torch.float32, and the model reads token ids"),
            ([torch.ones(1, 5) > 0], "sample 0 holds torch.bool, and the model reads token ids"),
            ([torch.ones(2, 3, 5, dtype=torch.long)], r"sample 0 has the shape \[2, 3, 5\]: token ids come as"),
            ([1j], "dataset holds a complex: use strings"),
            ([{"words": 3}], "dataset rows hold"),
            ([{"image": torch.ones(2, 2), "mask_": torch.ones(2, 2)}] * 0, "dataset is empty"),
            (3, "dataset is a int: pass a list"),
            (None, "no dataset: pass dataset="),
        ],
        ids=str,
    )
    def test_wrong_data(self, llama, tensors, message):
        with pytest.raises(ValueError, match=message):
            load_samples(tensors, llama)

    @pytest.mark.parametrize("name", ["num_samples", "max_length", "batch_size"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_wrong_numbers(self, llama, name, value):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            load_samples([torch.tensor([1])], llama, **{name: value})


class TestFiles:
    def test_txt_holds_a_text_on_each_line(self, llama, tmp_path):
        (tmp_path / "a.txt").write_text("ab\n\ncd\n")
        samples = load_samples(str(tmp_path / "a.txt"), llama, Letters(), num_samples=1, max_length=7)
        assert rows(samples) == [[[1, 2, 60, 60, 3, 4, 60]]]

    @pytest.mark.parametrize("kind", ["text", "tokens"])
    def test_jsonl_holds_text_or_tokens(self, llama, tmp_path, kind):
        records = [{"text": "ab", "id": 1}, {"text": "cd", "id": 2}]
        if kind == "tokens":
            records = [{"input_ids": [1, 2, 60]}, {"input_ids": [3, 4, 60]}]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
        samples = load_samples(path, llama, Letters(), num_samples=2, max_length=6)
        flat = [token for batch in rows(samples) for row in batch for token in row]
        assert flat == [1, 2, 60, 3, 4, 60] * (2 if kind == "text" else 1)

    def test_datasets_and_parquet(self, llama, tmp_path):
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_dict({"text": ["ab", "cd"], "label": [0, 1]})
        expected = [[[1, 2, 60, 3, 4, 60]]]
        assert rows(load_samples(data, llama, Letters(), num_samples=1, max_length=6)) == expected
        data.to_parquet(str(tmp_path / "a.parquet"))
        assert rows(load_samples(tmp_path / "a.parquet", llama, Letters(), num_samples=1, max_length=6)) == expected
        tokenised = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "label": [0, 1]})
        assert rows(load_samples(tokenised, llama)) == [[[1, 2]], [[3]]]
        with pytest.raises(ValueError, match=r"columns \['words'\], and neither 'text' nor 'input_ids'"):
            load_samples(datasets.Dataset.from_dict({"words": ["a"]}), llama, Letters())
        with pytest.raises(ValueError, match=r"splits \['train'\]: pass one of them"):
            load_samples(datasets.DatasetDict({"train": data}), llama, Letters())

    def test_wrong_paths(self, llama, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file .*A text itself goes in a list"):
            load_samples("a text that is no path", llama, Letters())
        (tmp_path / "a.csv").write_text("a")
        with pytest.raises(ValueError, match="ends in .csv: known are .txt, .jsonl and .parquet"):
            load_samples(tmp_path / "a.csv", llama, Letters())


def test_plain_models_take_tensors_by_position():
    model = nn.Sequential(nn.Linear(5, 4))
    samples = load_samples([torch.ones(3, 5), torch.ones(5)], model)
    assert [batch["input"].shape for batch in samples.batches] == [(3, 5), (1, 5)]


class TestDigest:
    """Equal numbers are other data where their shape, dtype or name is another."""

    @staticmethod
    def digest(*tensors, **named):
        model = nn.Identity()
        model.forward = lambda **kwargs: kwargs
        return load_samples([*tensors, *([named] if named else [])], model).digest

    def test_shape(self):
        whole = torch.arange(6)
        assert self.digest(whole.view(2, 3)) != self.digest(whole.view(3, 2)) != self.digest(whole.view(1, 6))
        assert self.digest(whole[:2], whole[2:]) != self.digest(whole[:3], whole[3:])

    def test_dtype(self):
        assert self.digest(torch.zeros(1, 2)) != self.digest(torch.zeros(1, 2, dtype=torch.float64)[:, :2])
        one = torch.tensor([[1.0, 2.0]])
        assert self.digest(one) != self.digest(one.view(torch.float16))
        assert self.digest(one.half()) != self.digest(one.half().view(torch.bfloat16))

    def test_name_and_numbers(self):
        one = torch.tensor([[1, 2]])
        assert self.digest(a=one) != self.digest(b=one)
        assert self.digest(a=one) != self.digest(a=one + 1)
        assert self.digest(a=one) == self.digest(a=one.int().long())


class TestStatistics:
    def test_sums_over_tokens(self):
        x = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
        for kind in (ColumnNorms, Hessian):
            statistics = kind(7, torch.device("cpu"))
            for part in x.split(11):
                statistics.add(part)
            assert statistics.num_tokens == 30
            assert (statistics.column_norms - x.norm(dim=0)).abs().max() < 1e-5
        assert (statistics.matrix - x.T @ x).abs().max() < 1e-4

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", [ColumnNorms, Hessian])
    def test_what_is_not_finite_is_seen(self, kind, bad):
        statistics = kind(3, torch.device("cpu"))
        statistics.add(torch.tensor([[0.0, bad, 1.0]]))
        assert not statistics.is_finite()


def gathered(model, batches, kind=Hessian):
    """Statistics of each layer on the dense model, by the walk."""
    layers = find_targets(model)
    found = {}
    with Walk(model, layers, batches) as walk:
        for step in walk.steps:
            found |= walk.measure(step, kind)
            walk.finish(step)
        return found, walk.steps, walk.replays


def explicit(model, batches, keep=None):
    """The same by hooks on the whole model."""
    sums = {}

    def hook(name):
        def add(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            x = x[keep.reshape(-1)] if keep is not None and x.shape[0] == keep.numel() else x
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in find_targets(model).items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return sums


class TestWalk:
    @pytest.mark.parametrize("family", [*BUILDERS, "t5"])
    def test_statistics_are_those_of_a_whole_forward(self, family):
        model = tiny_model(family)
        batches = [{"input_ids": ids[None]} for ids in token_samples(3)]
        if family == "t5":
            batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :9]} for batch in batches]
        found, steps, replays = gathered(model, batches)
        assert replays, "the blocks of a known family stand in for themselves"
        expected = explicit(model, batches)
        assert found.keys() == expected.keys()
        for name, statistics in found.items():
            limit = 1e-4 * expected[name].abs().max()
            assert (statistics.matrix - expected[name]).abs().max() <= limit, name

    def test_layers_with_one_input_share_statistics(self):
        found, *_ = gathered(tiny_model("llama"), [{"input_ids": token_samples(1)[0][None]}])
        attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
        assert found[f"{attention}q_proj"] is found[f"{attention}k_proj"] is found[f"{attention}v_proj"]
        assert found[f"{mlp}gate_proj"] is found[f"{mlp}up_proj"]
        assert found[f"{attention}q_proj"] is not found[f"{attention}o_proj"]

    def test_steps_come_in_the_order_in_which_they_run(self):
        model = tiny_model("opt")
        _, steps, _ = gathered(model, [{"input_ids": token_samples(1)[0][None]}])
        names = [step.block or list(step.layers) for step in steps]
        blocks = ["model.decoder.layers.0", "model.decoder.layers.1"]
        assert names == [["model.decoder.project_in"], *blocks, ["model.decoder.project_out"]]
        _, steps, _ = gathered(tiny_model("bert"), [{"input_ids": token_samples(1)[0][None]}])
        assert list(steps[-1].layers) == ["bert.pooler.dense"]

    @pytest.mark.parametrize("family", ["llama", "bert", "opt"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_left_out(self, family, side):
        model = tiny_model(family)
        ids = token_samples(1, 12)[0][None].repeat(2, 1)
        mask = torch.ones_like(ids)
        padded = slice(0, 5) if side == "left" else slice(7, 12)
        mask[1, padded] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        found, *_ = gathered(model, [batch])
        expected = explicit(model, [batch], keep=mask.bool())
        name = next(name for name in found if name.endswith(("o_proj", "output.dense", "fc2")))
        assert found[name].num_tokens == 19
        assert (found[name].matrix - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max()

    def test_blocks_that_are_done_are_not_run_again(self):
        model, runs = tiny_model("llama"), []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
        gathered(model, [{"input_ids": ids[None]} for ids in token_samples(5)])
        handle.remove()
        assert len(runs) == 1 + 5 + 5, "to plan on the first batch, to measure, and to feed the next block"

    def test_skips_over_blocks_are_run_whole(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                return torch.tanh(self.linear(x))

        class Skipping(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Block() for _ in range(4)])

            def forward(self, input):
                first = self.blocks[0](input)
                second = self.blocks[1](first)
                third = self.blocks[2](second)
                return self.blocks[3](third + first)

        torch.manual_seed(0)
        model = Skipping()
        batches = [{"input": torch.randn(2, 5, 6)} for _ in range(3)]
        found, steps, replays = gathered(model, batches)
        assert not replays and [step.block for step in steps] == [f"blocks.{index}" for index in range(4)]
        expected = explicit(model, batches)
        for name, statistics in found.items():
            assert (statistics.matrix - expected[name]).abs().max() < 1e-4

    def test_a_block_that_runs_twice_counts_both(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])

            def forward(self, input):
                for _ in range(3):
                    for block in self.blocks:
                        input = block(input)
                return input

        torch.manual_seed(0)
        model = Recurrent()
        found, steps, _ = gathered(model, [{"input": torch.randn(4, 6)}])
        assert [step.block for step in steps] == [""]
        assert {statistics.num_tokens for statistics in found.values()} == {12}
        expected = explicit(model, [{"input": torch.randn(4, 6)}])
        assert found.keys() == expected.keys()

    def test_inputs_that_are_the_same_only_sometimes_are_not_shared(self):
        class Fickle(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, input):
                return self.first(input) + self.second(input if input[0, 0] > 0 else input * 2)

        batches = [{"input": torch.full((1, 4), value)} for value in (1.0, -1.0)]
        found, *_ = gathered(Fickle(), batches)
        assert found["first"].matrix[0, 0] == 2 and found["second"].matrix[0, 0] == 5

    def test_a_tensor_changed_in_place_is_another(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, input):
                x = input.clone()
                return self.first(x) + self.second(x.mul_(3))

        found, *_ = gathered(InPlace(), [{"input": torch.ones(1, 4)}])
        assert found["first"].matrix[0, 0] == 1 and found["second"].matrix[0, 0] == 9

    def test_models_are_run_quietly_and_put_back(self):
        model = tiny_model("llama").train()
        model.model.layers[0].eval()
        seen = []
        handle = model.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (module.training, torch.is_grad_enabled(), kwargs["past_key_values"])
            ),
            with_kwargs=True,
        )
        modes = [module.training for module in model.modules()]
        precision = torch.get_float32_matmul_precision()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, *_ = gathered(model, [{"input_ids": token_samples(1)[0][None]}])
        handle.remove()
        assert seen and set(seen) == {(False, False, None)}
        assert [module.training for module in model.modules()] == modes
        assert model.config.use_cache is True and torch.get_float32_matmul_precision() == precision
        plain, *_ = gathered(model, [{"input_ids": token_samples(1)[0][None]}])
        assert torch.equal(found["model.layers.1.mlp.down_proj"].matrix, plain["model.layers.1.mlp.down_proj"].matrix)

    @pytest.mark.parametrize("chosen", ["medium", "high", "highest"])
    def test_matmuls_are_in_full_fp32(self, chosen):
        model, seen = tiny_model("llama"), []
        model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(chosen)
            gathered(model, [{"input_ids": token_samples(1)[0][None]}])
            assert seen and set(seen) == {"highest"}
            assert torch.get_float32_matmul_precision() == chosen
        finally:
            torch.set_float32_matmul_precision(before)

    def test_a_model_that_draws_is_repeatable_and_leaves_the_generator(self):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, input):
                return self.linear(input + torch.randn_like(input))

        model, batches = Noisy(), [{"input": torch.ones(2, 4)}]
        before = torch.get_rng_state()
        one, *_ = gathered(model, batches)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(9)
        two, *_ = gathered(copy.deepcopy(model), batches)
        assert torch.equal(one["linear"].matrix, two["linear"].matrix)
