"""Teachers that are the student in other clothes: what they wear, when they teach, and that nothing is left of them."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from sparsekit.archs import find_widths
from sparsekit.errors import CheckpointError
from sparsekit.train.adapters import add_lora, lora_parameters
from sparsekit.train.masked import Masked
from sparsekit.train.roles import Probe, Roles
from sparsekit.train.snapshots import Snapshots
from tests.train.live_tensors import storages

pytest.importorskip("peft", reason="peft is not installed")

IDS = torch.arange(24).view(2, 12) * 5 % 64


class Player:
    """A student with LoRA that adds something, under masks, and what it takes to play its teachers."""

    def __init__(self, model, **changes):
        self.widths = find_widths(model)
        args = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "all-linear", "seed": 0, **changes}
        self.model = add_lora(model, SimpleNamespace(**args))
        self.masked = Masked(self.model, self.widths)
        self.roles = Roles(self.model, self.masked)
        self.generator = torch.Generator().manual_seed(2)
        self.wander()
        self.model.train()

    @torch.no_grad()
    def wander(self, by=0.2):
        """Change the student's LoRA and masks, as training does."""
        for parameter in lora_parameters(self.model).values():
            parameter.add_(torch.randn(parameter.shape, generator=self.generator), alpha=by)
        self.masked.masks = self.some_masks()

    def some_masks(self):
        drawn = {w.name: torch.rand(w.num_units, generator=self.generator) for w in self.widths}
        return {name: mask * (mask > 0.3) for name, mask in drawn.items()}

    def take(self, snapshots, sparsity=0.1):
        return snapshots.take(sparsity, self.masked.masks, self.roles.lora())

    @torch.no_grad()
    def logits(self):
        """Return the student's own, without dropout."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        found = self.model(input_ids=IDS).logits
        for module, training in modes:
            module.training = training
        return found


@pytest.fixture
def player(llama):
    return Player(llama(attention_dropout=0.5))


def everything(player, optimizer=None):
    """Return all that may not change, copied; and what may not even be another object."""
    named = dict(player.model.named_parameters())
    copied = {name: (p.detach().clone(), p.requires_grad, p.dtype) for name, p in named.items()}
    modes = {name: module.training for name, module in player.model.named_modules()}
    off = {name: m.disable_adapters for name, m in player.model.named_modules() if hasattr(m, "disable_adapters")}
    state = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    same = {name: (id(p), p.data_ptr(), p._version) for name, p in named.items()}
    return copied, modes, off, state, same, id(player.masked.masks), torch.get_rng_state()


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def play(player, snapshot):
    """Run a teacher as a careless user would."""
    with player.roles.teacher(snapshot) as model:
        assert not any(module.training for module in model.modules())
        logits = model(input_ids=IDS).logits
        torch.rand(7)
    assert not logits.requires_grad
    return logits


def step(player, optimizer):
    loss = player.model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_the_student_is_as_it_was(player):
    player.model.base_model.model.lm_head.eval()  # a mode of its own
    optimizer = torch.optim.AdamW(lora_parameters(player.model).values(), lr=1e-2)
    step(player, optimizer)
    snapshot = player.take(Snapshots())
    player.wander()
    frozen = list(lora_parameters(player.model).values())[3].requires_grad_(False)
    before = everything(player, optimizer)
    for teacher in (snapshot, None, snapshot):
        play(player, teacher)
        assert_same(everything(player, optimizer), before)
        with pytest.raises(KeyError), player.roles.teacher(teacher):
            raise KeyError
        assert_same(everything(player, optimizer), before)
    with player.roles.student(None):
        pass
    assert_same(everything(player, optimizer), before)
    assert not frozen.requires_grad


def test_training_with_teachers_is_training_without_but_for_the_loss(llama):
    """The teacher is run and its answer left aside: the student goes the same way, dropout and optimizer included."""
    players = [Player(llama(attention_dropout=0.5)) for _ in range(2)]
    losses = []
    for player, is_taught in zip(players, (True, False), strict=True):
        snapshots, optimizer = Snapshots(), torch.optim.AdamW(lora_parameters(player.model).values(), lr=1e-2)
        torch.manual_seed(9)
        for index in range(4):
            snapshot = player.take(snapshots)
            if is_taught:
                play(player, None if index == 2 else snapshots[index // 2])
                play(player, snapshot)
            losses.append(step(player, optimizer))
    assert_same(losses[:4], losses[4:])
    assert_same(players[0].roles.lora(), players[1].roles.lora())


def test_a_teacher_may_play_between_a_forward_and_its_backward(player):
    snapshot = player.take(Snapshots())
    player.wander()
    gradients = []
    for is_taught in (False, True):
        torch.manual_seed(1)
        loss = player.model(input_ids=IDS, labels=IDS).loss
        if is_taught:
            play(player, snapshot)
            play(player, None)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in lora_parameters(player.model).items()})
        player.model.zero_grad()
    assert_same(*gradients)


def test_the_intact_teacher_is_the_base_model(llama):
    base = copy.deepcopy(llama())
    player = Player(llama())
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    assert torch.equal(play(player, None), expected)
    assert not torch.equal(player.logits(), expected)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_snapshots_say_later_what_they_said(player, tmp_path, on_disk):
    snapshots = Snapshots(tmp_path / "run" if on_disk else None)
    said = []
    for index in range(3):
        player.take(snapshots, index / 10)
        said.append(player.logits())
        player.wander()
    again = Snapshots(tmp_path / "other" if on_disk else None)
    again.load(load(save(snapshots.state_dict())))
    assert again.sparsities == [0.0, 0.1, 0.2]
    for kept in (snapshots, again):
        for index in (2, 0, 1, 1):
            assert torch.equal(play(player, kept[index]), said[index])
    assert not torch.equal(said[0], said[1])
    assert [s.sparsity for s in again] == [0.0, 0.1, 0.2]
    with pytest.raises(IndexError, match="snapshot 3 of 3"):
        snapshots[3]


def test_half_precision_snapshots_take_half_the_memory(player, tmp_path):
    whole, half, disk = Snapshots(), Snapshots(dtype=torch.bfloat16), Snapshots(tmp_path)
    for snapshots in (whole, half, disk):
        player.take(snapshots)
    masks = sum(4 * w.num_units for w in player.widths)
    lora = sum(p.nbytes for p in lora_parameters(player.model).values())
    assert (whole.num_bytes, half.num_bytes, disk.num_bytes) == (masks + lora, masks + lora // 2, 0)
    torch.testing.assert_close(play(player, half[0]), player.logits(), rtol=0, atol=0.05)
    assert {p.dtype for p in lora_parameters(player.model).values()} == {torch.float32}
    with pytest.raises(ValueError, match="torch.float32 or torch.bfloat16"):
        Snapshots(dtype=torch.float16)


def test_a_snapshot_is_a_copy(player):
    snapshots = Snapshots()
    taken = player.take(snapshots)
    before = {name: x.clone() for name, x in taken.lora.items()}
    player.wander()
    next(iter(player.masked.masks.values())).zero_()
    assert_same(taken.lora, before)


def test_one_copy_of_the_weights_whatever_the_number_of_teachers(llama):
    nothing = sum(storages().values())
    player, snapshots = Player(llama(hidden_size=64, intermediate_size=256)), Snapshots()
    weights = sum(p.nbytes for p in player.model.base_model.model.parameters())
    lora = sum(p.nbytes for p in lora_parameters(player.model).values())
    play(player, player.take(snapshots))  # the memory that teachers' LoRA is put into
    before, alone = storages(), snapshots.num_bytes
    for _ in range(12):
        play(player, player.take(snapshots))
        play(player, None)
        player.wander()
    more = sum(storages().values()) - sum(before.values())
    assert 12 * lora < snapshots.num_bytes - alone < weights
    assert more <= snapshots.num_bytes - alone + 4 * sum(w.num_units for w in player.widths)
    assert sum(before.values()) - nothing < 1.05 * weights + 4 * lora


@pytest.mark.parametrize("around", [True, False], ids=["autocast around both", "autocast around each"])
def test_autocast_does_not_mix_them_up(player, around):
    """It keeps the cast weights of a parameter, and a role's are not the student's."""
    snapshot = player.take(Snapshots())
    player.wander()

    def cast():
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)

    def student():
        player.model.eval()
        loss = player.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in lora_parameters(player.model).items()}
        player.model.zero_grad()
        return loss.detach(), found

    with cast():
        alone = student()
    with cast() if around else warnings.catch_warnings():
        with cast():
            first = play(player, snapshot)
        with cast():
            taught = student()
        with cast():
            again = play(player, snapshot)
    assert_same(taught, alone)
    assert torch.equal(first, again)


def test_checkpointed_gradients_are_the_student_s(player):
    snapshot = player.take(Snapshots())
    player.wander()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            player.model.gradient_checkpointing_enable({"use_reentrant": False})
            player.model.enable_input_require_grads()
        play(player, snapshot)
        torch.manual_seed(1)
        player.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in lora_parameters(player.model).items()})
        player.model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_masks_alone(llama):
    model = llama()
    masked = Masked(model, find_widths(model))
    roles, snapshots = Roles(model, masked, adapter=None), Snapshots()
    masks = {w.name: torch.arange(w.num_units) % 2.0 for w in find_widths(model)}
    snapshot = snapshots.take(0.3, masks, roles.lora())
    with roles.teacher(snapshot):
        said = model(input_ids=IDS).logits
    assert masked.masks is None
    masked.masks = masks
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, said)


def test_roles_that_cannot_be_played(player, llama):
    with pytest.raises(ValueError, match="no LoRA named 'default'"):
        Roles(llama(), player.masked)
    other = Player(llama(), lora_targets=["q_proj"])
    snapshot = other.take(Snapshots())
    before = everything(player)
    with pytest.raises(ValueError, match="another LoRA than the model"):
        play(player, snapshot)
    with player.roles.teacher(None), pytest.raises(RuntimeError, match="plays a role already"):
        play(player, None)
    assert_same(everything(player), before)


def test_states_that_are_none_are_refused(player):
    snapshots = Snapshots()
    player.take(snapshots)
    state = snapshots.state_dict()
    for wrong in (
        {},
        {**state, "1.masks.x": torch.zeros(1)},
        {"sparsity": torch.zeros(1)},
        {**state, "0.x": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match="no snapshots of teachers"):
            snapshots.load(wrong)
    assert len(snapshots) == 1
    snapshots.load({"sparsity": torch.zeros(0)})
    assert len(snapshots) == 0


def test_a_file_that_is_gone_is_said(player, tmp_path):
    snapshots = Snapshots(tmp_path)
    player.take(snapshots)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"snapshot-0000.safetensors cannot be read.*resume from a checkpoint"):
        snapshots[0]


# --- how far a teacher is --------------------------------------------------------------------------------------------


def kl(teacher, student):
    p, q = (torch.log_softmax(x.double().flatten(0, -2), -1) for x in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_distances_are_kl(player):
    snapshots = Snapshots()
    said = [play(player, None)]
    for index in range(3):
        said.append(play(player, player.take(snapshots, index / 10)))
        player.wander()
    masks = player.some_masks()
    before = everything(player)
    probe = Probe(player.roles, {"input_ids": IDS, "labels": IDS})
    found = probe.distances(snapshots, masks)
    assert_same(everything(player), before)
    with player.roles.student(masks) as model:
        student = model(input_ids=IDS).logits
    expected = [kl(teacher, student) for teacher in said]
    assert [found.intact, *found.snapshots] == pytest.approx(expected, rel=1e-4)
    assert len({round(x, 6) for x in expected}) == 4
    player.take(snapshots, 0.5)
    assert probe.distances(snapshots, player.masked.masks).snapshots[-1] == pytest.approx(0, abs=1e-6)


def test_a_teacher_is_asked_once(player):
    snapshots, calls = Snapshots(), []
    player.model.register_forward_pre_hook(lambda *_: calls.append(player.masked.masks))
    probe = Probe(player.roles, {"input_ids": IDS})
    for index in range(3):
        player.take(snapshots, index / 10)
        probe.distances(snapshots, None)
    assert len(calls) == 4 + 3  # three snapshots and the intact model, and the student each time
    other = Snapshots()  # another run's, as after resuming
    player.take(other, 0.7)
    probe.distances(other, None)
    assert len(calls) == 7 + 2


def test_fewer_tokens_of_a_teacher_and_padding(player):
    """The rest of the vocabulary is one bucket, so that a distance is at most the whole one; padding does not count."""
    snapshots = Snapshots()
    teacher = play(player, player.take(snapshots))
    player.wander()
    masks = player.masked.masks
    with player.roles.student(masks) as model:
        student = model(input_ids=IDS).logits
    few = Probe(player.roles, {"input_ids": IDS}, top_k=5).distances(snapshots, masks).snapshots[0]
    assert 0 < few < kl(teacher, student)
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.int64)], 1)
    seen = torch.cat([torch.ones_like(IDS), torch.zeros(2, 3, dtype=torch.int64)], 1)
    probe = Probe(player.roles, {"input_ids": padded, "attention_mask": seen})
    assert probe.distances(snapshots, masks).snapshots[0] == pytest.approx(kl(teacher, student), rel=1e-3)
