"""Plans: against what a small run really makes, counts, and says."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdnb import plan as p
from kdnb.core import make_rng
from kdnb.lm import LM, Tokens, _transformers, llama_config
from kdnb.params import SmolLM2Params, load_run
from kdnb.pipeline import Pipeline
from kdnb.sampling import sample_lm
from kdnb.training import TrainConfig, train_lm

ROOT = Path(__file__).parent.parent
TIERS = ["smoke", "laptop", "gpu", "paper"]
TINY = """
notebook: {root}/nbs/experiments/smollm2.ipynb
params: {{source: {source}, vocab_size: 256, prompt: "The", max_length: 6, n_seeds: 2, n_pilot: 8, n_train: 600, n_select: 40, n_eval: 40,
  teacher_width: 128, teacher_layers: 2, teacher_epochs: 2, student_width: 64, student_layers: 1, student_epochs: 1, batch_size: 50}}
grid: {{tau: [direct, 0.6]}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run file, and its two cells, made."""
    file = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    file.write_text(TINY.format(root=ROOT, source="smollm2-135m-instruct"))
    run = load_run(file)
    made = [Pipeline(SmolLM2Params(**run.params, tau=tau)) for tau in ("direct", 0.6)]
    for cell in made:
        cell.scores()
        for seed in range(2):
            cell.embeddings("truth", seed)
    return run, made


def test_every_artifact_of_a_real_run_is_priced_once(tiny):
    run, made = tiny
    recipes = {r.key: r for cell in made for r in cell.recipes()}
    bill = p.prices(run)
    assert [x.stage for x in bill] == ["weights", *(r.stage for r in recipes.values())]
    assert all(r.folder.is_dir() for r in recipes.values())


def test_disk_and_tokens_are_what_a_real_run_leaves(tiny):
    run, made = tiny
    bill = p.prices(run)
    for price, recipe in zip(bill[1:], {r.key: r for cell in made for r in cell.recipes()}.values(), strict=True):
        disk = sum(f.stat().st_size for f in recipe.folder.rglob("*") if f.is_file())
        assert disk < 1.1 * price.disk_bytes + 4000, (recipe.stage, price.disk_bytes, disk)
        if recipe.stage != "teacher-draws":  # a teacher of 600 sentences often stops early
            assert disk > 0.9 * price.disk_bytes - 4000, (recipe.stage, price.disk_bytes, disk)
    drawn = sum(int(made[0].truth_tokens(split).length.sum()) for split in ("train", "select", "eval-0", "eval-1"))
    priced = sum(x.tokens for x in bill if x.stage == "truth")
    assert priced == (600 + 40 + 2 * 40) * 6
    assert 0.8 * priced < drawn <= priced  # few sequences of six tokens stop


def counted(work: p.Work, do) -> tuple[float, float]:
    """FLOPs that PyTorch counts, and those predicted."""
    def product(x, w, *_, **__):  # shapes; PyTorch counts no product of oneDNN's
        return 2 * math.prod(x) * w[0]

    ours = {torch.ops.mkldnn._linear_pointwise: product} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        do()
    return counter.get_total_flops(), work.flops


def small_lm(vocab_size: int) -> LM:
    config = llama_config(vocab_size=vocab_size, width=128, layers=2)
    config._attn_implementation = "eager"  # a fused kernel on a CPU is not counted
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(0)
        model = _transformers().LlamaForCausalLM(config)
    return LM(model, prompt_ids=(1,), stop_ids=(), max_length=8)


@pytest.fixture
def small() -> LM:
    return small_lm(200)


@pytest.mark.parametrize(("vocab_size", "seed"), [(20_000, 0), (200, 2), (20, 5), (3, 4)])
def test_flops_of_sampling_are_those_counted(vocab_size, seed):
    """What is planned is the most: a prefix that several sequences have in common is computed once."""
    lm, drawn = small_lm(vocab_size), []
    work = p.Work("sample", p.Network.of(lm.model.config), 6, 8, 6)
    real, said = counted(work, lambda: drawn.append(sample_lm(lm, 6, rng=make_rng(seed))))
    prefixes = [len(drawn[0].ids[:, :t].unique(dim=0)) for t in range(1, 8)]
    assert (sum(prefixes) == 6 * 7) == (vocab_size == 20_000)
    first = work.network.flops(1, 1, 1)
    once = first + sum(work.network.flops(n, 1 + t, n) for t, n in enumerate(prefixes, 1))
    assert real == pytest.approx(once, rel=2e-3)
    assert real == pytest.approx(said, rel=2e-3) if sum(prefixes) == 6 * 7 else real < said


def test_flops_of_training_are_those_counted(small):
    tokens = Tokens(torch.randint(200, (8, 8), generator=make_rng(1)), torch.full((8,), 8))
    work = p.Work("train", p.Network.of(small.model.config), 8, 8, 8)
    real, said = counted(work, lambda: train_lm(small, tokens, TrainConfig(epochs=1, batch_size=8), rng=make_rng(2)))
    assert abs(real / said - 1) < 0.03


def rates(kind_rate: float = 1e11):
    """A machine on which everything runs at one rate."""
    return lambda *_: kind_rate


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_plans_on_any_machine_and_the_total_adds_up(tier):
    bill = p.prices(load_run(ROOT / f"params/smollm2-{tier}.yaml"))
    machine = p.Machine([w for x in bill for w in x.work], rate=rates())
    *stages, total = p.plan(bill, machine, p.ACCELERATORS["h100"])
    for column in ("artifacts", "tokens", "flops", "disk_bytes", "here_s", "device_s"):
        assert total[column] == pytest.approx(sum(row[column] for row in stages), rel=1e-9)
    for column in ("network_bytes", "array_bytes"):
        assert total[column] == max(row[column] for row in stages)
    assert [row["stage"] for row in stages] == list(p.STAGES.values())


def test_the_paper_tier_is_the_published_recipe():
    """Cha and Cho 2025, §4."""
    run = load_run(ROOT / "params/smollm2-paper.yaml")
    assert run.grid == {"tau": ["direct", 0.8, 0.875, 0.95, 1.0]}
    params = SmolLM2Params(**run.params)
    assert (params.n_train, params.max_length + 1, params.n_seeds, params.batch_size, params.lr) == (10_000_000, 512, 5, 256, 5e-4)
    assert (params.teacher_epochs, params.student_epochs, params.vocab_size) == (5, 1, 49_152)
    train = TrainConfig(epochs=5)
    assert (train.betas, train.warmup, train.decay) == ((0.9, 0.95), 0.01, 0.2)
    pricer = p._Pricer(params)
    assert {role: net.n_parameters for role, net in pricer.roles.items()} == {"teacher": 361_821_120, "student": 134_515_008}
    assert pricer.truth.n_parameters == 1_711_376_384


def test_more_workers_share_a_stage_but_not_one_artifact():
    bill = p.prices(load_run(ROOT / "params/smollm2-smoke.yaml"))
    work = [w for x in bill for w in x.work]
    one, two = (p.plan(bill, p.Machine(work, workers=n, rate=rates()), p.ACCELERATORS["a100"]) for n in (1, 2))
    assert two[0]["here_s"] == one[0]["here_s"]  # weights: one artifact
    assert two[2]["here_s"] == pytest.approx(one[2]["here_s"] / 2)


def test_an_accelerator_is_bound_by_its_slowest_part():
    assert p.accelerator_s(p.Work("train", p.PUBLISHED["1.7b"], 256, 512, 256), p.ACCELERATORS["h100"]) == pytest.approx(
        p.Work("train", p.PUBLISHED["1.7b"], 256, 512, 256).flops / (0.4 * 989e12)
    )
    one_at_a_time = p.Work("sample", p.PUBLISHED["135m"], 1, 100, 1, number_bytes=2)
    assert p.accelerator_s(one_at_a_time, p.ACCELERATORS["h100"]) == pytest.approx(100 * 30 * p.LAUNCH_S)


def test_the_command_prints_a_plan_of_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(p, "CALIBRATION_S", 0.2)
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY.format(root=ROOT, source="smollm2-135m-instruct"))
    assert p.main([str(file), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["run"] == "tiny"
    assert said["total"]["tokens"] == sum(row["tokens"] for row in said["stages"]) > 0
    assert said["this_machine"]["matmul_flops_s"] > 1e9
    assert all(row["here_s"] >= 0 for row in said["stages"])
    assert p.main([str(file), "--device", "rtx4090"]) == 0
    text = capsys.readouterr().out
    assert "total" in text
    assert "rtx4090: 165 TFLOP/s bf16 at 40%" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (["params/gmm.yaml"], "kdnb_plan: notebook must be smollm2.ipynb to be planned, got gmm.ipynb"),
    (["params/smollm2-smoke.yaml", "--device", "tpu"], "kdnb_plan: --device must be one of h100, a100, rtx4090, got 'tpu'"),
    (["params/none.yaml"], "kdnb_plan: "),
])
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert p.main([str(ROOT / arguments[0]), *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_an_unknown_source_says_what_to_do():
    with pytest.raises(ValueError, match="source must be a model folder or a SmolLM2 to be planned, got 'someone/else'; download it and name the folder"):
        p.source_network("someone/else")


@pytest.mark.parametrize(("value", "unit", "text"), [(0, "B", "–"), (999.4, "B", "999 B"), (999.6, "B", "1 kB"), (5.21e9, "", "5.21 G"), (1e25, "", "10 Y")])
def test_amounts(value, unit, text):
    assert p._amount(value, unit) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "–"), (0.04, "0.0 s"), (89, "89.0 s"), (91, "1.5 min"), (86_400, "24.0 h"), (3 * 365 * 86_400, "3.0 a")])
def test_durations(seconds, text):
    assert p._duration(seconds) == text


# ---- many accelerators ----

H100 = p.ACCELERATORS["h100"]


@pytest.fixture(scope="module")
def paper():
    """Everything that the paper's run asks for."""
    return p.prices(load_run(ROOT / "params/smollm2-paper.yaml"))


def test_sampling_is_calibrated_on_the_published_rate():
    """10 million sequences of 511 tokens at 9,200 tokens a second are 154 hours."""
    hours = p.calibrated_s(p.Work("sample", p.PUBLISHED["1.7b"], 256 * 40_000, 511, 256, number_bytes=2), H100) / 3600
    assert hours == pytest.approx(256 * 40_000 * 511 / 9_200 / 3600, rel=1e-9)
    assert hours * 10_000_000 / (256 * 40_000) == pytest.approx(154.3, abs=0.05)


def test_a_ring_sends_every_number_twice_but_for_its_own_part():
    assert [p.ring_bytes(1000, g) for g in (1, 2, 4, 8)] == [0, 4000, 6000, 7000]


def test_a_shared_step_by_hand(paper):
    """The teacher of 361,821,120 parameters: 256 sequences of 511 tokens after one of the prompt, 32 at a time, on eight and on sixteen."""
    teacher = next(x for x in paper if x.stage == "teacher")
    flops = 3 * (2 * 314_572_800 * 511 + 4 * 32 * 960 * 511 * 511 + 2 * 49_152 * 960 * 511)  # of a sequence; the matrices of the layers have 314,572,800
    arithmetic, sending = p.step_s(teacher, H100, 8)
    assert arithmetic == pytest.approx(max(32 * flops / (0.4 * 989e12), 3 * 32 * 0.8e-3))
    assert sending == pytest.approx(7 * 361_821_120 / 300e9)
    arithmetic, sending = p.step_s(teacher, H100, 16)
    assert arithmetic == pytest.approx(3 * 32 * 0.8e-3)  # 16 sequences: kernels are started no faster
    assert sending == pytest.approx(7.5 * 361_821_120 / 50e9)


def test_one_accelerator_takes_as_long_as_all_the_work(paper):
    *stages, total = p.scale(paper, H100, 1)
    assert total["wall_s"] == pytest.approx(sum(p.calibrated_s(w, H100) for x in paper for w in x.work), rel=1e-4)
    assert total["sent_bytes"] == 0
    assert [row["stage"] for row in stages] == list(p.STAGES.values())


def test_trainings_stand_side_by_side_in_the_groups_that_end_first():
    """Five equal trainings whose arithmetic is all there is: two groups of four in three rounds, or one of eight in five."""
    net = p.Network(10, 64, 1, 1, 1, 64)
    price = p.Price("teacher", (p.Work("train", net, 64_000, 100_000, 64), p.Work("heldout", net, 1, 100, 1)), step=64)
    whole = p.step_s(price, H100, 1)[0]
    rows = {n: next(r for r in p.scale([price] * 5, H100, n) if r["stage"] == "teachers") for n in (1, 5, 8)}
    assert (rows[1]["group"], rows[5]["group"], rows[8]["group"]) == (1, 1, 8)
    assert rows[1]["wall_s"] == pytest.approx(5 * 1000 * whole, rel=2e-3)
    assert rows[5]["wall_s"] == pytest.approx(1000 * whole, rel=2e-3)
    assert rows[8]["wall_s"] == pytest.approx(5 * 1000 * sum(p.step_s(price, H100, 8)), rel=2e-3)
    assert rows[8]["sent_bytes"] == 5 * 1000 * 7 * net.n_parameters


def test_a_step_has_no_more_parts_than_sequences():
    net = p.PUBLISHED["1.7b"]
    price = p.Price("teacher", (p.Work("train", net, 640, 500_000, 4), p.Work("heldout", net, 4, 8, 4)), step=4)
    assert next(r for r in p.scale([price], H100, 1000) if r["stage"] == "teachers")["group"] == 4


def test_more_accelerators_are_never_slower_nor_better_than_their_number(paper):
    walls = {n: p.scale(paper, H100, n)[-1]["wall_s"] for n in (1, 2, 8, 64, 512)}
    assert list(walls.values()) == sorted(walls.values(), reverse=True)
    assert all(walls[1] / n <= wall * (1 + 1e-9) for n, wall in walls.items())


def test_the_command_plans_many_accelerators_without_measuring_this_machine(capsys, monkeypatch, paper):
    monkeypatch.setattr(p, "Machine", None)
    file = str(ROOT / "params/smollm2-paper.yaml")
    assert p.main([file, "--gpus", "8", "512"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("smollm2-paper: 365 G tokens, 1.11 TB on disk\nstage")
    assert said.splitlines()[1].split() == ["stage", "8", "GPUs", "512", "GPUs"]
    assert "9,200 tokens/s of the 1.7B on an h100" in said
    assert p.main([file, "--gpus", "8", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["gpus"]["8"] == p.scale(paper, H100, 8)
    assert p.main([file, "--gpus", "0"]) == 2
    assert capsys.readouterr().err == "kdnb_plan: --gpus must be >= 1, got 0\n"
