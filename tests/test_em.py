"""Guards of kdnb.em. Oracles: scikit-learn from the same start, a textbook EM in NumPy, closed forms."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

from kdnb import em
from kdnb.core import make_rng
from kdnb.em import fit_em
from kdnb.mixture import Mixture, grid_truth

KINDS = ("spherical", "diag", "full")


def points(d=2, n=300, seed=0, k=4):
    "Overlapping clusters of different shapes: EM has work to do."
    rng = np.random.default_rng(seed)
    centre, root = 1.5 * rng.normal(size=(k, d)), rng.normal(size=(k, d, d)) / math.sqrt(d)
    label = rng.integers(k, size=n)
    return centre[label] + (root[label] @ rng.normal(size=(n, d, 1)))[..., 0]


def scikit_learn(start: Mixture, x, n_iter):
    covs = start.covs.numpy()
    g = GaussianMixture(
        len(covs), covariance_type=start.covariance, reg_covar=0, tol=0.0, max_iter=n_iter, weights_init=start.weights.numpy(),
        means_init=start.means.numpy(), precisions_init=np.linalg.inv(covs) if start.covariance == "full" else 1 / covs,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with tol=0.0 it always warns
        return g.fit(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 8])
def test_same_path_as_scikit_learn(kind, d):
    x = points(d)
    start = fit_em(x, 4, kind, rng=make_rng(0), n_init=1, max_iter=0, reg=0.0)
    assert start.mixture.covariance == kind
    assert (start.n_iter.item(), start.converged.item()) == (0, False)
    for n_iter in (1, 30):
        ours = fit_em(x, 4, kind, rng=make_rng(0), n_init=1, max_iter=n_iter, tol=0.0, reg=0.0)
        theirs = scikit_learn(start.mixture, x, ours.n_iter.item())
        np.testing.assert_allclose(ours.log_likelihood.item(), theirs.score(x), atol=1e-8)
        np.testing.assert_allclose(ours.mixture.means, theirs.means_, atol=1e-7)
        np.testing.assert_allclose(ours.mixture.covs, theirs.covariances_, atol=1e-7)


def textbook_step(x, weights, means, covs):
    "One EM step with full covariances, written as sums over points."
    log_joint = np.stack([np.log(w) + stats.multivariate_normal(m, c).logpdf(x) for w, m, c in zip(weights, means, covs, strict=True)])
    resp = np.exp(log_joint - logsumexp(log_joint, axis=0))
    new = [(r.mean(), m := (r[:, None] * x).sum(0) / r.sum(), sum(ri * np.outer(xi - m, xi - m) for ri, xi in zip(r, x, strict=True)) / r.sum()) for r in resp]
    return [np.array(a) for a in zip(*new, strict=True)]


def test_one_step_is_the_textbooks():
    x = points()
    start = fit_em(x, 3, "full", rng=make_rng(1), n_init=1, max_iter=0, reg=0.0).mixture
    once = fit_em(x, 3, "full", rng=make_rng(1), n_init=1, max_iter=1, reg=0.0).mixture
    for ours, theirs in zip((once.weights, once.means, once.covs), textbook_step(x, start.weights.numpy(), start.means.numpy(), start.covs.numpy()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reg", [1e-6, 0.05])
def test_likelihood_never_falls_even_where_the_floor_binds(kind, reg):
    x = points(3, n=60)
    path = [fit_em(x, 4, kind, rng=make_rng(2), n_init=1, max_iter=i, tol=0.0, reg=reg).log_likelihood.item() for i in range(0, 40, 2)]
    assert (np.diff(path) > -1e-10).all()
    assert path[-1] > path[0] + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihood_is_that_of_the_returned_mixture(kind):
    x = torch.tensor(np.stack([points(seed=s) for s in range(3)]))
    fit = fit_em(x, 3, kind, rng=make_rng(3))
    assert fit.log_likelihood.shape == fit.n_iter.shape == fit.converged.shape == fit.mixture.batch_shape == (3,)
    assert fit.converged.all()
    np.testing.assert_allclose(fit.log_likelihood, fit.mixture.log_prob(x).mean(-1), rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_the_closed_form(kind):
    x = points(3)
    fit = fit_em(x, 1, kind)
    cov = np.cov(x.T, bias=True)
    np.testing.assert_allclose(fit.mixture.means[0], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fit.mixture.covs[0], {"spherical": cov.trace() / 3, "diag": np.diag(cov), "full": cov}[kind], rtol=1e-11)
    assert (fit.n_iter.item(), fit.converged.item()) == (0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_million_from_the_origin(kind):
    x = points()
    here, there = fit_em(x, 3, kind, rng=make_rng(4)), fit_em(x + 1e6, 3, kind, rng=make_rng(4))
    np.testing.assert_allclose(there.mixture.means - 1e6, here.mixture.means, atol=1e-7)  # x + 1e6 itself is rounded to 1e-10
    np.testing.assert_allclose(there.mixture.covs, here.mixture.covs, atol=1e-7)
    np.testing.assert_allclose(there.log_likelihood, here.log_likelihood, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_matter(kind):
    x = points(3)
    a = torch.tensor([2.0**-30] * 3 if kind == "spherical" else [2.0**-30, 2.0**10, -(2.0**3)], dtype=torch.float64)  # exact in float64
    plain, scaled = fit_em(x, 4, kind, rng=make_rng(5)), fit_em(x * a.numpy(), 4, kind, rng=make_rng(5))
    unit = {"spherical": a[0] ** 2, "diag": a**2, "full": a[:, None] * a}[kind]
    np.testing.assert_allclose(scaled.mixture.means, plain.mixture.means * a, rtol=1e-9)
    np.testing.assert_allclose(scaled.mixture.covs, plain.mixture.covs * unit, rtol=1e-9, atol=1e-12 * float(unit.abs().max()))
    np.testing.assert_allclose(scaled.log_likelihood, plain.log_likelihood - a.abs().log().sum(), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_does_not_depend_on_the_neighbours(kind, monkeypatch):
    rng = np.random.default_rng(6)
    x = np.stack([points(seed=s) for s in range(10)])
    start = x[:, :4]
    together = fit_em(x, 4, kind, means_init=start)
    assert together.n_iter.unique().numel() > 4  # they stop at different steps
    monkeypatch.setitem(em.BLOCK_BYTES, "cpu", 1 << 17)
    in_blocks = fit_em(x, 4, kind, means_init=start)
    mixed = rng.permutation(10)
    shuffled = fit_em(x[mixed], 4, kind, means_init=start[mixed])
    for i in range(10):
        alone, j = fit_em(x[i], 4, kind, means_init=start[i]), mixed.tolist().index(i)
        for other, at in ((together, i), (in_blocks, i), (shuffled, j)):
            assert other.n_iter[at] == alone.n_iter
            np.testing.assert_allclose(other.mixture.means[at], alone.mixture.means, rtol=1e-8, atol=1e-9)  # products may add in another order
            np.testing.assert_allclose(other.mixture.covs[at], alone.mixture.covs, rtol=1e-8, atol=1e-9)


def test_restarts_stop_on_their_own_and_the_likeliest_is_returned():
    x = np.stack([points(seed=s) for s in range(4)])
    several = fit_em(x, 4, rng=make_rng(7), n_init=6)
    centres = em._draw_centres(
        em._features(em._standardise(torch.tensor(x), "diag")[0], "diag"), torch.rand(4, 6, 4, generator=make_rng(7), dtype=torch.float64), 2
    )
    _, centre, scale = em._standardise(torch.tensor(x), "diag")
    singly = [fit_em(x, 4, means_init=centres[:, r] * scale[:, None] + centre[:, None]) for r in range(6)]
    log_likelihood = torch.stack([s.log_likelihood for s in singly])
    best = log_likelihood.argmax(0)
    np.testing.assert_allclose(several.log_likelihood, log_likelihood.amax(0), rtol=1e-10)
    np.testing.assert_array_equal(several.n_iter, torch.stack([s.n_iter for s in singly])[best, range(4)])


def test_the_same_seed_gives_the_same_bits():
    x = np.stack([points(seed=s) for s in range(5)])
    a, b = (fit_em(x, 4, rng=make_rng(8)).mixture for _ in range(2))
    for name in ("weights", "means", "covs"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_leading_axes_are_problems():
    x = np.stack([points(seed=s, n=50) for s in range(6)])
    flat, nested = fit_em(x, 2, rng=make_rng(9)), fit_em(x.reshape(2, 3, 50, 2), 2, rng=make_rng(9))
    assert nested.mixture.batch_shape == (2, 3)
    np.testing.assert_array_equal(nested.mixture.means.reshape(6, 2, 2), flat.mixture.means)
    np.testing.assert_array_equal(nested.log_likelihood.reshape(6), flat.log_likelihood)


def test_kmeans_plus_plus_finds_eight_far_clusters():
    truth = grid_truth(var=1e-6).expand(50)
    x = truth.sample(200, make_rng(10))
    fit = fit_em(x, 8, rng=make_rng(11), n_init=1)
    # D² sampling takes a point of an unseen cluster with probability 1 - 1e-5 or more at each of 7 steps: false alarm below 5 %, seed fixed
    np.testing.assert_allclose(fit.mixture.means.sort(1).values, grid_truth().means.sort(0).values.expand(50, 8, 2), atol=1e-3)
    np.testing.assert_allclose(fit.mixture.covs.mean(), 1e-6, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_component_keeps_a_finite_place(kind):
    x = np.repeat([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]], [4, 3, 2], axis=0)  # three values, five components
    fit = fit_em(x, 5, kind, rng=make_rng(12))
    assert fit.mixture.means.isfinite().all()
    np.testing.assert_allclose(fit.mixture.mean(), x.mean(0), rtol=1e-9)
    far = fit_em(points(), 2, kind, means_init=[[0.0, 0.0], [1e9, 1e9]])  # the second has no point
    np.testing.assert_allclose(far.mixture.weights.sum(), 1, rtol=1e-14)
    assert far.log_likelihood >= fit_em(points(), 1, kind).log_likelihood - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapsed_component_stops_at_the_floor(kind):
    x = np.concatenate([points(n=40), [[30.0, 30.0]] * 2])
    fit = fit_em(x, 2, kind, means_init=[[0.0, 0.0], [30.0, 30.0]], reg=1e-4)
    cov = fit.mixture.covs[1].numpy()
    share = {"spherical": lambda: cov / x.var(0).mean(), "diag": lambda: cov / x.var(0), "full": lambda: np.linalg.eigvalsh(cov / np.outer(x.std(0), x.std(0)))}[kind]()
    np.testing.assert_allclose(share, 1e-4, rtol=1e-6)
    np.testing.assert_allclose(fit.mixture.weights[1], 2 / 42, rtol=1e-9)


def test_more_features_than_points_has_a_full_covariance():
    x = np.random.default_rng(0).normal(size=(4, 6))
    fit = fit_em(x, 1, "full", reg=1e-3)
    values = np.linalg.eigvalsh(fit.mixture.covs[0].numpy() / np.outer(x.std(0), x.std(0)))
    np.testing.assert_allclose(values[:3], 1e-3, rtol=1e-9)  # rank 3
    np.testing.assert_allclose(values[3:], np.linalg.eigvalsh(np.corrcoef(x.T))[3:], rtol=1e-9)


def test_as_many_components_as_points():
    fit = fit_em([[0.0], [1.0], [5.0]], 3, rng=make_rng(13), n_init=1)
    np.testing.assert_allclose(fit.mixture.means.sort(0).values, [[0.0], [1.0], [5.0]], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_quick_step_is_the_softmax(kind, weighted, monkeypatch):
    x = np.stack([points(seed=seed) for seed in range(3)])
    w = np.random.default_rng(1).uniform(size=(3, 300)) if weighted else None
    quick = fit_em(x, 4, kind, weights=w, rng=make_rng(0), max_iter=20, tol=0.0)
    monkeypatch.setattr(em, "FAR", 1.0)  # no ratio is near enough
    by_softmax = fit_em(x, 4, kind, weights=w, rng=make_rng(0), max_iter=20, tol=0.0)
    np.testing.assert_allclose(quick.log_likelihood, by_softmax.log_likelihood, atol=1e-12)
    np.testing.assert_allclose(quick.mixture.means, by_softmax.mixture.means, atol=1e-9)
    assert not np.array_equal(quick.mixture.means, by_softmax.mixture.means)  # they are two ways


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_ratios_beyond_all_numbers(kind, weighted):
    """Two spikes a million of their widths apart, and a point between them: density 1e-300 and less, and 1e12 at the spikes."""
    rng = np.random.default_rng(0)
    x = np.concatenate([1e-6 * rng.normal(size=(200, 2)) + side for side in (-1, 1)] + [np.zeros((1, 2))])
    w = np.ones(401) if weighted else None
    fit = fit_em(x, 2, kind, weights=w, means_init=[[-1.0, -1.0], [1.0, 1.0]], max_iter=3, tol=0.0, reg=1e-9)
    np.testing.assert_allclose(fit.log_likelihood.item(), fit.mixture.log_prob(x).mean().item(), rtol=1e-7)  # z² − 2zμ + μ² at variance 1e-9
    np.testing.assert_allclose(fit.mixture.weights.sum().item(), 1.0, rtol=1e-15)
    assert fit.mixture.means.isfinite().all()
    both = fit_em(np.stack([x, rng.normal(size=x.shape)]), 2, kind, weights=w, means_init=[[-1.0, -1.0], [1.0, 1.0]], max_iter=3, tol=0.0, reg=1e-9)
    assert torch.equal(both.mixture.means[0], fit.mixture.means)


def test_well_separated_points_underflow_quietly():
    x = np.concatenate([points(n=50, seed=s) + 1e5 * s for s in range(3)])
    fit = fit_em(x, 3, rng=make_rng(14), reg=0.0)
    np.testing.assert_allclose(fit.mixture.means.sort(0).values, [points(n=50, seed=s).mean(0) + 1e5 * s for s in range(3)], atol=1e-9)  # 1e-14 of the spread
    np.testing.assert_allclose(fit.mixture.weights, 1 / 3, rtol=1e-10)


X = points(n=10)
REFUSED = {
    "x must be finite, got nan at [1, 0]; drop or repair that point": lambda: fit_em([[0.0], [math.nan], [1.0]], 1),
    "x must be finite, got inf at [0, 2, 1]": lambda: fit_em(np.array([[[0.0, 1.0], [2.0, 3.0], [4.0, np.inf]]]), 1),
    "x must have shape (..., n, d), got (3,)": lambda: fit_em([0.0, 1.0, 2.0], 1),
    "x must vary in every feature, got only 2.0 in feature 1 of problem 1; drop the feature: a density there would be infinite": lambda: fit_em(
        np.stack([X, np.stack([X[:, 0], np.full(10, 2.0)], 1)]), 2, rng=make_rng(0)
    ),
    "x must vary in every feature, got only 5.0 in feature 0 of problem 0": lambda: fit_em([[5.0, 6.0]], 1),
    "n_components must be between 1 and the number of points, 10, got 11; use fewer components or more points": lambda: fit_em(X, 11, rng=make_rng(0)),
    "n_components must be between 1 and the number of points, 10, got 0": lambda: fit_em(X, 0, rng=make_rng(0)),
    "covariance must be \"spherical\", \"diag\" or \"full\", got 'tied'": lambda: fit_em(X, 2, "tied", rng=make_rng(0)),
    "n_init must be finite and >= 1, got 0": lambda: fit_em(X, 2, rng=make_rng(0), n_init=0),
    "max_iter must be finite and >= 0, got -1": lambda: fit_em(X, 2, rng=make_rng(0), max_iter=-1),
    "tol must be finite and >= 0, got nan": lambda: fit_em(X, 2, rng=make_rng(0), tol=math.nan),
    "reg must be finite and >= 0, got -1.0": lambda: fit_em(X, 2, rng=make_rng(0), reg=-1.0),
    "means_init must have shape (2, 2) or (3, 2, 2), got (2, 1)": lambda: fit_em(np.stack([X] * 3), 2, means_init=[[0.0], [1.0]]),
    "means_init must be finite, got nan at [0, 0]": lambda: fit_em(X, 2, means_init=[[math.nan, 0.0], [1.0, 1.0]]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        REFUSED[message]()


def test_starts_need_a_generator():
    with pytest.raises(TypeError, match=re.escape("rng must be a torch.Generator, got None; pass kdnb.core.make_rng(seed), or means_init")):
        fit_em(X, 2)


@pytest.mark.parametrize("kind", ["spherical", "diag", "full"])
def test_a_point_of_weight_three_is_three_points(kind):
    x = points(seed=1)
    copies = np.arange(len(x)) % 4
    start = x[[1, 2, 3, 5]]
    weighted = fit_em(x, 4, kind, weights=copies, means_init=start)
    repeated = fit_em(np.repeat(x, copies, axis=0), 4, kind, means_init=start)
    assert weighted.n_iter == repeated.n_iter
    np.testing.assert_allclose(weighted.log_likelihood, repeated.log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(weighted.mixture.means, repeated.mixture.means, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(weighted.mixture.covs, repeated.mixture.covs, rtol=1e-7, atol=1e-9)


def test_equal_weights_change_nothing_and_their_scale_does_not_matter():
    x = points(seed=2)
    plain, equal = fit_em(x, 3, rng=make_rng(1)), fit_em(x, 3, rng=make_rng(1), weights=np.full(len(x), 7.0))
    assert plain.n_iter == equal.n_iter
    np.testing.assert_allclose(plain.mixture.means, equal.mixture.means, rtol=1e-9)
    np.testing.assert_allclose(plain.log_likelihood, equal.log_likelihood, rtol=1e-12)


def test_problems_may_share_points_and_differ_in_weights():
    x = points(seed=3)
    w = np.random.default_rng(0).exponential(size=(3, len(x)))
    together = fit_em(x, 3, weights=w, means_init=x[:3])
    for i in range(3):
        alone = fit_em(x, 3, weights=w[i], means_init=x[:3])
        np.testing.assert_allclose(together.mixture.means[i], alone.mixture.means, rtol=1e-8)
        np.testing.assert_allclose(together.log_likelihood[i], np.average(alone.mixture.log_prob(x), weights=w[i]), rtol=1e-9)


def test_points_of_weight_zero_are_not_there():
    x = points(seed=4)
    w = (np.arange(len(x)) < 60).astype(float)
    some, without = fit_em(x, 1, weights=w).mixture, fit_em(x[:60], 1).mixture
    np.testing.assert_allclose(some.covs, without.covs, rtol=1e-10)
    drawn = em._draw_centres(
        em._features(torch.tensor(x)[None], "diag"), torch.rand(1, 50, 3, generator=make_rng(2), dtype=torch.float64), x.shape[1], torch.tensor(w)[None] * len(x) / 60
    )
    assert all((x[:60] == c).all(1).any() for c in drawn.reshape(-1, x.shape[1]).numpy())


@pytest.mark.parametrize(("weights", "message"), [
    ([1.0, 2.0], "weights must hold one number per point on the last axis, 5, got shape (2,)"),
    ([1.0, 1.0, -1.0, 1.0, 1.0], "weights must be finite and >= 0, got -1.0 at [2]; a point may have weight 0"),
    ([1.0, 1.0, math.nan, 1.0, 1.0], "weights must be finite and >= 0, got nan at [2]"),
    ([[1.0] * 5, [0.0] * 5], "weights must not all be 0, as they are in problem [1]; drop that problem"),
    ([0.0, 2.0, 0.0, 0.0, 0.0], "x must vary in every feature, got only 1.0 in feature 0 of problem 0"),
])
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_em([[0.0, 1.0], [1.0, 3.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0]], 1, weights=weights)
