"""Whole models under `torch.compile`: one graph, no recompilation from token to token, the numbers of eager.

With a GPU the same tests run there, in mode "reduce-overhead": CUDA graphs.
"""

import copy
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import sparsekit as sk
from sparsekit.nn import sparse_layers
from tests.test_pack import prune24_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MODE = "reduce-overhead" if DEVICE == "cuda" else "default"
GRAPHS = "inductor" if DEVICE == "cuda" else "aot_eager"
"""Compiles where it is counted how often; on CPUs without the minute that a C++ compiler takes."""
NEW_TOKENS = 12


def close(got, expected):
    rtol, atol = (5e-2, 5e-2) if DTYPE == torch.bfloat16 else (1e-4, 1e-5)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def llama(num_layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return prune24_(LlamaForCausalLM(config).eval()).to(DEVICE, DTYPE)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return prune24_(BertForMaskedLM(config).eval()).to(DEVICE, DTYPE)


BUILDERS = {"llama": llama, "bert": bert}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def packed(dense, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine where only the reference runs
        return sk.pack_(copy.deepcopy(dense), **options)


def tokens(*shape, seed=1):
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("family", BUILDERS)
class TestForward:
    def test_is_one_graph_with_the_numbers_of_eager(self, family, fuse):
        dense = BUILDERS[family]()
        model = packed(dense, fuse=fuse)
        counter = CompileCounterWithBackend(GRAPHS)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            for seed in (1, 2, 3):
                ids = tokens(2, 7, seed=seed)
                logits = compiled(input_ids=ids).logits.clone()
                close(logits, model(input_ids=ids).logits)
                close(logits, dense(input_ids=ids).logits)
            assert counter.frame_count == 1 and not counters["graph_break"]
            found = torch._dynamo.explain(model)(input_ids=tokens(2, 7))
        assert found.graph_break_count == 0 and found.graph_count == 1

    def test_fuses_in_the_graph_too(self, family, fuse):
        model = packed(BUILDERS[family](), fuse=fuse)
        calls = []

        def spy(graph, inputs):
            calls.extend(node for node in graph.graph.nodes if "linear_semi24" in str(node.target))
            return graph

        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend=spy)(input_ids=tokens(2, 7))
        layers = sparse_layers(model).values()
        groups = {layer.group for layer in layers if layer.group is not None}
        assert len(calls) == len(layers) - sum(len(group.members) - 1 for group in groups)
        assert len(groups) == (0 if not fuse else 4 if family == "llama" else 2)

    def test_gradients_of_the_input(self, family, fuse):
        dense = BUILDERS[family]()
        model = packed(dense, fuse=fuse)
        grads = []
        for one in (torch.compile(model, fullgraph=True, backend=GRAPHS), dense):
            x = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))).to(DEVICE, DTYPE).requires_grad_()
            one(inputs_embeds=x).logits.float().pow(2).sum().backward()
            grads.append(x.grad)
        close(grads[0] / grads[1].abs().max(), grads[1] / grads[1].abs().max())


class TestNothingStaleInTheGraph:
    """What is written to x between two layers of a group is seen by the second."""

    def run(self, change=None):
        """Return (what the compiled MLP of a fused model gives, what the dense one gives), each with `change`."""
        dense = llama(num_layers=1)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
        results = []
        with torch.no_grad():
            for model in (packed(dense, fuse=True), dense):
                mlp = model.model.layers[0].mlp
                handle = change(mlp) if change else None
                step = torch.compile(mlp, fullgraph=True, backend="eager") if model is not dense else mlp
                results.append(step(x.clone()))
                if handle is not None:
                    handle.remove()
        return results

    def test_by_a_function_that_is_compiled(self):
        dense = llama(num_layers=1)
        mlp, expected = packed(dense, fuse=True).model.layers[0].mlp, dense.model.layers[0].mlp

        def run(x):
            gate = mlp.gate_proj(x)
            x.mul_(2)
            return gate, mlp.up_proj(x)

        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
        with torch.no_grad():
            wanted = expected.gate_proj(x), expected.up_proj(2 * x)
            for one, other in zip(torch.compile(run, fullgraph=True, backend="eager")(x), wanted, strict=True):
                close(one, other)
        assert mlp.gate_proj.group.product is None

    def test_by_a_hook_of_a_layer(self):
        def hook(layer, inputs):
            inputs[0].mul_(2)

        close(*self.run(lambda mlp: mlp.up_proj.register_forward_pre_hook(hook)))

    def test_by_a_hook_of_all_modules(self):
        from torch.nn.modules.module import register_module_forward_pre_hook

        def change(mlp):
            def hook(module, inputs):
                if module is mlp.up_proj:
                    inputs[0].mul_(2)

            return register_module_forward_pre_hook(hook)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of global hooks
            close(*self.run(change))

    def test_by_nobody(self):
        close(*self.run())


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
class TestDecoding:
    """Static cache, the step from token to token compiled."""

    def generated(self, model, **options):
        ids = tokens(2, 5)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            cache_implementation="static",
            **options,
        )

    def test_generate_compiles_as_transformers_do_it(self, fuse):
        """`generate` itself compiles the step, as it does by default on GPUs, here by `compile_config`."""
        from transformers import CompileConfig

        dense = llama(num_layers=1)
        options = {"mode": MODE} if fuse or DEVICE == "cuda" else {"backend": GRAPHS, "mode": None}
        config = CompileConfig(fullgraph=True, dynamic=False, **options)
        config._compile_all_devices = True  # transformers compile on CPUs for their tests alone
        expected = self.generated(dense, disable_compile=True)
        assert torch.equal(self.generated(packed(dense, fuse=fuse), compile_config=config), expected)
        assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]

    def test_one_graph_serves_all_tokens(self, fuse):
        from transformers import StaticCache

        dense = llama()
        model = packed(dense, fuse=fuse)
        counter = CompileCounterWithBackend(GRAPHS)
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)

        def decode(prefill, step):
            cache = StaticCache(config=model.config, max_cache_len=32)
            ids = tokens(2, 5)
            answer = []
            with torch.no_grad():
                logits = prefill(input_ids=ids, past_key_values=cache, use_cache=True).logits
                for i in range(NEW_TOKENS):
                    ids = logits[:, -1:].argmax(-1)
                    answer.append(ids.clone())
                    position = torch.full((2, 1), 5 + i, device=DEVICE)
                    torch.compiler.cudagraph_mark_step_begin()
                    logits = step(input_ids=ids, past_key_values=cache, position_ids=position, use_cache=True).logits
            return torch.cat(answer, 1)

        expected = decode(dense, dense)
        assert torch.equal(decode(model, step), expected)
        assert counter.frame_count == 1 and not counters["graph_break"], "compiled anew from token to token"
        assert torch.equal(decode(model, step), expected)
        assert counter.frame_count == 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
def test_captured_by_a_cuda_graph(fuse):
    model = packed(llama(), fuse=fuse)
    ids = tokens(1, 1)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=ids).logits
        out.zero_()
        graph.replay()
        close(out, expected)
        ids.add_(1)
        graph.replay()
        close(out, model(input_ids=ids).logits)
