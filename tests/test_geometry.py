"""Geometry: neighbours against brute force, intervals against fresh draws, and a map that is the same twice."""

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from kdnb import geometry as g
from kdnb.core import make_rng
from kdnb.lm import Tokens, llama_config, new_lm, toy_lm

K = 3


def cloud(seed, n, d=3, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, d, generator=make_rng(seed, "cloud", n))


def oracle(truth, generated, k):
    """The four formulas with loops over balls; radii by scikit-learn."""
    truth, generated = truth.double().numpy(), generated.double().numpy()
    reach = [NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1] for x in (truth, generated)]
    precise = [sum(np.linalg.norm(x - r) <= radius for r, radius in zip(truth, reach[0], strict=True)) for x in generated]
    recalled = [any(np.linalg.norm(x - r) <= radius for r, radius in zip(generated, reach[1], strict=True)) for x in truth]
    covered = [any(np.linalg.norm(x - r) <= radius for x in generated) for r, radius in zip(truth, reach[0], strict=True)]
    return [np.mean(np.array(precise) > 0), np.mean(recalled), np.mean(precise) / k, np.mean(covered)]


@pytest.fixture(scope="module")
def toy():
    return toy_lm(vocab_size=5, max_length=6)


# ---- embeddings ----


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_embeddings_are_those_of_one_sequence_at_a_time(toy, batch_size):
    tokens = toy.sample(30, make_rng(1))
    assert len(set(tokens.length.tolist())) > 2  # otherwise nothing is padded
    found = g.embed(toy, tokens, batch_size)
    assert found.shape == (30, 16)
    assert found.dtype == torch.float32
    with torch.no_grad():
        for row, ids, length in zip(found, tokens.ids.tolist(), tokens.length.tolist(), strict=True):
            states = toy.model.model(input_ids=torch.tensor([[0, *ids[:length]]])).last_hidden_state[0]
            np.testing.assert_allclose(row, states[:length].mean(0), atol=3e-6)  # float32, values near 1


def test_a_long_prompt_is_read_and_only_its_last_state_counts(toy):
    lm = replace(toy, prompt_ids=(0, 3, 2))
    tokens = Tokens(torch.tensor([[1, 4, -1], [1, 4, 0]]), torch.tensor([2, 3]))
    with torch.no_grad():
        states = lm.model.model(input_ids=torch.tensor([[0, 3, 2, 1, 4]])).last_hidden_state[0]
    np.testing.assert_allclose(g.embed(lm, tokens)[0], states[2:4].mean(0), atol=3e-6)
    assert not torch.equal(g.embed(lm, tokens)[0], g.embed(toy, tokens)[0])


def test_equal_texts_are_equal_points_whatever_lies_beyond_their_end(toy):
    short = Tokens(torch.tensor([[1, 0]]), torch.tensor([2]))
    wide = Tokens(torch.tensor([[1, 0, 3, 3], [2, 2, 2, 0]]), torch.tensor([2, 4]))
    points = g.embed_sets(toy, {"a": short, "b": wide})
    assert torch.equal(points["a"][0], points["b"][0])
    assert points["b"].shape == (2, 16)
    noisy = {"a": points["a"], "b": points["b"] + torch.tensor([[1e-6], [0.0]])}  # as another batch would round
    assert not torch.equal(noisy["a"][0], noisy["b"][0])
    again = g.embed_sets(toy, {"a": short, "b": wide}, noisy)
    assert torch.equal(again["b"], torch.stack([points["a"][0], points["b"][1]]))


def test_embedding_refuses_tokens_of_another_vocabulary(toy):
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 5\), got 9 at \[0, 0\]"):
        g.embed(toy, Tokens(torch.tensor([[9]]), torch.tensor([1])))


# ---- the four numbers ----


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 30, 3, K), (30, 45, 1, 1), (60, 25, 8, 5), (12, 9, 2, 2)])
def test_numbers_are_those_of_brute_force(n, m, d, k):
    truth, generated = cloud(1, n, d), cloud(2, m, d, shift=0.6, scale=0.7)
    found = g.knn_metrics(truth, generated, k)
    np.testing.assert_allclose([e.mean for e in found], oracle(truth, generated, k), rtol=1e-6)
    assert [e.n for e in found] == [m, n, m, n]
    assert all(e.lo <= e.mean <= e.hi for e in found)
    assert all(0 <= e.lo <= e.hi <= 1 for e in (found.precision, found.recall, found.coverage))


def test_blocks_change_nothing(monkeypatch):
    truth, generated = cloud(1, 60), cloud(2, 50, shift=0.5)
    whole = g.knn_metrics(truth, generated, K)
    monkeypatch.setattr(g, "ROWS", 7)
    np.testing.assert_allclose(np.array(g.knn_metrics(truth, generated, K)), np.array(whole), rtol=1e-12)


def test_every_replicate_is_brute_force_without_the_group():
    """Standard errors by really leaving each group out of one set and starting again."""
    truth, generated = cloud(1, 44), cloud(2, 41, shift=0.6, scale=0.7)
    groups = g._groups(44), g._groups(41)
    left = [[oracle(truth[groups[0] != b], generated, K) for b in range(20)], [oracle(truth, generated[groups[1] != b], K) for b in range(20)]]
    variance = sum(19 / 20 * ((np.array(reps) - np.mean(reps, 0)) ** 2).sum(0) for reps in left)
    np.testing.assert_allclose([e.se for e in g.knn_metrics(truth, generated, K)], np.sqrt(variance), rtol=1e-5)


def test_groups_are_even_and_do_not_follow_the_order():
    group = g._groups(1000)
    assert group.bincount().tolist() == [50] * 20
    assert torch.equal(group, g._groups(1000))
    assert abs(np.corrcoef(group, np.arange(1000) % 20)[0, 1]) < 0.15  # five standard errors
    assert sorted(g._groups(7).tolist()) == list(range(7))


def test_equal_distributions_have_the_expected_density_and_coverage():
    """Naeem et al. 2020, §3.3: density 1, coverage 1 − Π (n−i)/(n+m−i); 30 pairs, four standard errors (6e-5)."""
    found = [g.knn_metrics(cloud(s, 120), cloud(1000 + s, 90), K) for s in range(30)]
    for name, expected in (("density", 1.0), ("coverage", 1 - math.prod((120 - i) / (210 - i) for i in range(1, K + 1)))):
        means = np.array([getattr(m, name).mean for m in found])
        assert abs(means.mean() - expected) < 4 * means.std(ddof=1) / 30**0.5, name


def test_disjoint_supports_share_nothing_and_the_interval_says_how_surely():
    found = g.knn_metrics(cloud(1, 100), cloud(2, 100, shift=90), K)
    assert [e.mean for e in found] == [0, 0, 0, 0]
    assert 0.02 < found.precision.hi < 0.06  # 0 of 100
    assert found.precision.lo == 0


def test_a_collapsed_generator_is_precise_and_recalls_little():
    modes = 20 * torch.eye(4)
    truth = modes[torch.arange(200) % 4] + cloud(1, 200, 4)
    found = g.knn_metrics(truth, modes[0] + cloud(2, 200, 4), K)
    assert found.precision.mean > 0.9
    assert found.precision.lo > 0.7  # outliers of the generator's mode miss the balls
    assert found.recall.hi < 0.35
    assert found.coverage.hi < 0.35
    one = g.knn_metrics(truth, truth[:1].expand(200, -1), K)  # a single point, again and again
    assert one.precision.mean == 1
    assert one.recall.mean == 1 / 200


def test_copies_of_the_truth_are_inside_even_without_room():
    x = torch.zeros(30, 2)
    found = g.knn_metrics(x, x, K)
    assert [e.mean for e in found] == [1, 1, 10, 1]
    far = 1e4 + cloud(1, 30)  # far from the origin: differences, not squares
    assert g.knn_metrics(far, far, 1).precision.mean == 1


def test_intervals_hold_the_mean_of_fresh_draws():
    """At least 95 %: fewer than 68 of 80 has a chance of 1e-4 at that level; and not more than twice too wide."""
    def draw(s):
        return g.knn_metrics(cloud(s, 100, 2), cloud(5000 + s, 100, 2, shift=0.5, scale=0.7), K)

    many = [draw(s) for s in range(160)]
    for name in ("recall", "density", "coverage"):
        truth = np.mean([getattr(m, name).mean for m in many[:80]])
        assert sum(getattr(m, name).lo <= truth <= getattr(m, name).hi for m in many[80:]) >= 68, name
        spread = np.std([getattr(m, name).mean for m in many])
        assert 1 < np.sqrt(np.mean([getattr(m, name).se ** 2 for m in many])) / spread < 2, name


@pytest.mark.parametrize("hits", [0, 1, 37, 100])
def test_a_share_of_independent_points_has_wilsons_interval(hits):
    """Replicates with exactly the binomial variance: Student's t at 19 degrees is the normal at 96.36 %."""
    p, n = hits / 100, 100
    wanted = math.sqrt(p * (1 - p) / n)
    shape = torch.tensor([-1.0, 1.0] * 10).double()
    replicates = p + shape * wanted / math.sqrt(2 * 19)
    found = g._share(p, [replicates, replicates], n)
    np.testing.assert_allclose(found.se, wanted, rtol=1e-9, atol=1e-12)
    theirs = binomtest(hits, n).proportion_ci(0.96365, method="wilson")
    np.testing.assert_allclose([found.lo, found.hi], [theirs.low, theirs.high], atol=3e-3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda x: (x, x[:6], 5), r"k must be in \[1, 4\] for the 6 points of generated, got 5; a group of the jackknife must leave k neighbours"),
    (lambda x: (x, x, 50), r"k must be in \[1, 46\] for the 50 points of truth, got 50"),
    (lambda x: (x, x, 0), r"k must be in \[1, 46\] for the 50 points of truth, got 0"),
    (lambda x: (x, x[:0], 1), r"k must be in \[1, 0\] for the 0 points of generated, got 1"),
    (lambda x: (x, x[:, :2], 5), r"generated must have the width of truth, 3, got 2; embed both with the same model"),
    (lambda x: (x, x.index_fill(0, torch.tensor(4), torch.nan), 5), r"generated must be finite, got nan at \[4, 0\]"),
    (lambda x: (x.index_fill(0, torch.tensor(2), -torch.inf), x, 5), r"truth must be finite, got -inf at \[2, 0\]"),
])
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        g.knn_metrics(*make(cloud(1, 50)))


# ---- the map ----


@pytest.mark.slow  # numba compiles UMAP
def test_the_map_is_the_same_twice_and_keeps_what_is_near(toy):
    x = torch.cat([cloud(1, 60, 8), cloud(2, 60, 8, shift=9)])
    here = g.project(x, seed=1)
    assert here.shape == (120, 2)
    assert here.dtype == np.float32
    np.testing.assert_array_equal(g.project(x, seed=1), here)
    assert not np.array_equal(g.project(x, seed=2), here)
    near = NearestNeighbors(n_neighbors=10).fit(here).kneighbors(return_distance=False)
    assert ((near < 60) == (np.arange(120) < 60)[:, None]).mean() > 0.99  # two clouds stay two

    student = new_lm(llama_config(vocab_size=5, width=64, layers=1), seed=4, like=toy)
    sets = {"truth": toy.sample(40, make_rng(1)), "student": student.sample(50, make_rng(2))}
    words = type("Words", (), {"batch_decode": staticmethod(lambda rows: [" ".join(map(str, r)) for r in rows])})
    made = g.geometry(replace(toy, tokenizer=words), sets, k=K, shown=30)
    assert list(made.frame.columns) == ["series", "x", "y", "text"]
    assert made.frame["series"].value_counts().to_dict() == {"truth": 30, "student": 30}
    assert made.frame["text"][31] == " ".join(map(str, [0, *sets["student"].ids[1, : sets["student"].length[1]].tolist()]))
    assert list(made.metrics) == ["student"]
    points = g.embed_sets(toy, sets)
    assert made.metrics["student"] == g.knn_metrics(points["truth"], points["student"], K)
    assert made.metrics == g.measure_sets(toy, sets, k=K)
    both = g.combine_metrics([made.metrics, g.measure_sets(toy, {**sets, "student": student.sample(50, make_rng(3))}, k=K)])
    assert both["student"].recall.n == 2


def test_messages_of_the_map(toy, monkeypatch):
    with pytest.raises(ValueError, match="embeddings must hold more than 15 points, got 15; UMAP joins each to its 15 nearest"):
        g.project(torch.zeros(15, 2))
    with pytest.raises(ValueError, match=r"embeddings must be finite, got nan at \[3, 0\]"):
        g.project(torch.zeros(20, 2).index_fill(0, torch.tensor(3), torch.nan))
    with pytest.raises(ValueError, match="sets must hold the reference 'truth', got 'a', 'b'"):
        g.measure_sets(toy, dict.fromkeys("ab", toy.sample(20, make_rng(1))))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"umap-learn must be installed to draw embeddings, got no module umap; run `pip install kdnb\[geometry\]`"):
        g.project(cloud(1, 30))


def test_importing_the_module_does_not_import_numba():
    code = "import sys, kdnb.geometry; print('umap' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_map_is_of_the_graph_that_umap_finds_itself():
    x = torch.randn(300, 20, generator=make_rng(0, "graph"))
    settings = {"n_neighbors": 15, "random_state": 0, "n_jobs": 1, "init": "pca", "n_epochs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import umap

        ours, theirs = (umap.UMAP(**settings, precomputed_knn=knn).fit(x.numpy()).graph_ for knn in (g._neighbours(x, 15), (None, None, None)))
    np.testing.assert_allclose(ours.toarray(), theirs.toarray(), atol=1e-4)  # distances by different formulas in single precision
    assert ours.nnz > 300 * 15
