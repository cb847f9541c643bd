"""Teacher selection: targets, the ruler of averages, exact policy gradients, and a policy that learns them."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from kdnb.core import make_rng
from kdnb.neighbours.common import conditional_ruler
from kdnb.neighbours.online import forward_kl
from kdnb.neighbours.teacher_selection import (
    Selector,
    all_actions,
    choice_log_prob,
    expected_update,
    fit_softmax,
    mean_of_selected,
    train_selector,
)


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=make_rng(seed, "numbers"), dtype=torch.float64)


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_choice_once(k):
    found = all_actions(k)
    assert {tuple(row) for row in found.tolist()} == set(itertools.product((0.0, 1.0), repeat=k))
    assert len(found) == 2**k
    assert not found[0].any()


@pytest.mark.parametrize("a", all_actions(3)[1:].tolist())
def test_a_free_student_ends_at_the_mean_of_the_selected(a):
    teachers = randoms(3, 4).log_softmax(-1).numpy()

    def loss(z):
        s = log_softmax(z)
        return sum(w * np.sum(np.exp(t) * (t - s)) for w, t in zip(a, teachers, strict=True))

    found = minimize(loss, np.zeros(4), tol=1e-12)
    made = mean_of_selected(torch.tensor(teachers)[None], torch.tensor([a], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64))
    np.testing.assert_allclose(made[0], softmax(found.x), atol=1e-6)  # BFGS with numerical gradients


def test_nobody_selected_leaves_the_other_target():
    label = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    actions = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    teachers = randoms(2, 2, 2).log_softmax(-1)
    made = mean_of_selected(teachers, actions, label)
    np.testing.assert_array_equal(made[0], label[0])
    np.testing.assert_allclose(made[1], teachers[1, 0].exp())


def test_choices_broadcast_over_draws_and_seeds():
    teachers, label = randoms(2, 5, 3, 4).log_softmax(-1), torch.full((2, 5, 4), 0.25, dtype=torch.float64)
    actions = (randoms(6, 2, 5, 3) > 0).double()
    made = mean_of_selected(teachers, actions, label)
    assert made.shape == (6, 2, 5, 4)
    np.testing.assert_allclose(made.sum(-1), 1)
    np.testing.assert_allclose(made[3, 1], mean_of_selected(teachers[1], actions[3, 1], label[1]))


# --- the ruler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_averaging_keeps_the_mean_precision_and_raises_recall_and_entropy(seed):
    some = (2 * randoms(5, 30, 6, seed=seed)).log_softmax(-1)
    each, mean = conditional_ruler(some[:4], some[4]), conditional_ruler(some[:4].exp().mean(0).log(), some[4])
    np.testing.assert_allclose(mean.precision, each.precision.mean(), rtol=1e-13)
    assert mean.recall > each.recall.mean() + 0.01
    assert mean.student_entropy > each.student_entropy.mean() + 0.01


# --- policy gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_log_probability_is_a_product_of_bernoullis(k):
    z = randoms(k)
    probs = [np.prod([expit(t) if a else 1 - expit(t) for a, t in zip(row, z.tolist(), strict=True)]) for row in all_actions(k).tolist()]
    np.testing.assert_allclose(choice_log_prob(z, all_actions(k)).exp(), probs, rtol=1e-12)
    np.testing.assert_allclose(sum(probs), 1)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_update_is_the_gradient_of_the_expected_reward(k):
    z, rewards, h = randoms(k), randoms(2**k, seed=1), 1e-6

    def value(z):
        pi = np.array([np.prod([expit(t) if a else 1 - expit(t) for a, t in zip(row, z, strict=True)]) for row in all_actions(k).tolist()])
        return pi @ rewards.numpy(), pi

    def slope(pick):
        return [(pick(z.numpy() + h * e) - pick(z.numpy() - h * e)) / (2 * h) for e in np.eye(k)]

    np.testing.assert_allclose(expected_update(z, rewards), slope(lambda z: value(z)[0]), atol=1e-8)
    pi = value(z.numpy())[1]
    forgetful = slope(lambda z: (pi * rewards.numpy()) @ value(z)[1])  # E[R ∇π] with π held in the expectation
    np.testing.assert_allclose(expected_update(z, rewards, with_log=False), forgetful, atol=1e-8)
    assert np.abs(np.array(forgetful) - slope(lambda z: value(z)[0])).max() > 1e-3


def test_without_the_logarithm_a_constant_reward_pulls():
    z = torch.tensor([1.0, -0.5], dtype=torch.float64)
    np.testing.assert_allclose(expected_update(z, torch.ones(4)), 0, atol=1e-15)
    pulled = expected_update(z, torch.ones(4), with_log=False)
    assert pulled[0] > 0.01  # towards what is likely already
    assert pulled[1] < -0.01


def test_one_step_of_the_selector_follows_the_true_gradient():
    """The sign of Adam's first step is that of its gradient: wrong here with probability below 1e-6."""
    rewards = torch.tensor([0.0, 0.2, 1.0, 0.7], dtype=torch.float64)
    policy = Selector(torch.eye(2, dtype=torch.float64).expand(1, 2, 2), lr=0.01)
    actions = policy.draw(20_000, make_rng(0, "draws"))
    assert actions.shape == (20_000, 1, 2)
    policy.learn(actions, rewards[(actions[:, 0] @ torch.tensor([2.0, 1.0], dtype=torch.float64)).long()])
    true = expected_update(torch.zeros(2, dtype=torch.float64), rewards)
    np.testing.assert_allclose(policy.theta.detach(), 0.01 * true.sign(), rtol=1e-4)
    grads = policy.theta.grad  # the estimate itself: 20,000 draws, standard error below 0.002
    np.testing.assert_allclose(-grads, true, atol=0.01)


def test_leave_one_out_baseline_is_that():
    state = randoms(3, 2, 4)
    policy, rewards = Selector(state), torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    actions = policy.draw(3, make_rng(1, "draws"))
    policy.learn(actions, rewards)
    advantage = [1.0 - 1.0, 4.0 + 0.5, -2.0 - 2.5]
    by_hand = sum(w * ((a - 0.5)[..., None] * state).sum((0, 1)) for w, a in zip(advantage, actions, strict=True)) / 3  # ∇log π at θ = 0
    np.testing.assert_allclose(policy.theta.grad, -by_hand, atol=1e-12)


def test_selectors_of_a_batch_do_not_mix():
    state, rewards = randoms(2, 4, 3, 5), randoms(6, 2, seed=2)
    both = Selector(state)
    actions = both.draw(6, make_rng(2, "draws"))
    both.learn(actions, rewards)
    alone = Selector(state[1])
    alone.learn(actions[:, 1], rewards[:, 1])
    np.testing.assert_allclose(both.theta[1].detach(), alone.theta.detach())


# --- students -----------------------------------------------------------------------------------


def test_classifier_is_the_least_cross_entropy():
    x, t = torch.cat([torch.ones(40, 1), randoms(40, 2)], -1).double(), (2 * randoms(40, 3, seed=1)).softmax(-1)
    weights = randoms(40, seed=2).exp()
    made = fit_softmax(x, t, weights, steps=1500)

    def loss(w):
        w = w.reshape(3, 3)
        return 1e-3 * np.sum(w**2) - np.sum((weights / weights.sum()).numpy()[:, None] * t.numpy() * log_softmax(x.numpy() @ w, axis=-1))

    np.testing.assert_allclose(made.flatten(), minimize(loss, np.zeros(9), tol=1e-12).x, atol=1e-4)


def test_classifiers_in_batches_do_not_mix():
    x, t = randoms(2, 20, 3), randoms(2, 20, 4, seed=1).softmax(-1)
    np.testing.assert_allclose(fit_softmax(x, t, steps=50)[1], fit_softmax(x[1], t[1], steps=50), atol=1e-9)


def test_a_policy_learns_which_teacher_is_right_where():
    """Two teachers, each right on one side; the reward is the truth's, so the side decides. A fixed seed."""
    x = randoms(200, 1)
    side = (x[:, 0] > 0).long()
    labels = torch.nn.functional.one_hot(side, 2).double()
    right, wrong = torch.tensor([0.9, 0.1]).double().log(), torch.tensor([0.1, 0.9]).double().log()
    teachers = torch.stack([right.expand(200, 2), wrong.expand(200, 2)], -2)  # the first says class 0 everywhere, the second class 1
    features = torch.cat([torch.ones(200, 1), x], -1).double()
    who = torch.eye(2, dtype=torch.float64).expand(200, 2, 2)
    policy = Selector(torch.cat([who, who * x[:, None, :]], -1), lr=0.05)
    train_selector(policy, teachers, labels, features, lambda w, t, rows: (labels[rows] * t.clamp(min=1e-3).log()).sum(-1).mean(-1), make_rng(3, "policy"), 500, otherwise=teachers.exp().mean(-2))
    chance = policy.logits().sigmoid().detach()
    clear = x[:, 0].abs() > 0.5
    assert chance[clear, side[clear]].min() > 0.6  # the side's own teacher
    assert chance[clear, 1 - side[clear]].max() < 0.4


def test_policies_repeat():
    x, y, t = randoms(1, 30, 2), torch.nn.functional.one_hot((randoms(1, 30) > 0).long(), 2).double(), randoms(1, 30, 3, 2).log_softmax(-1)
    ends = []
    for _ in range(2):
        policy = Selector(randoms(1, 30, 3, 4, seed=5))
        train_selector(policy, t, y, x, lambda w, t, rows: -forward_kl(t.clamp(min=1e-9).log(), (x[:, rows] @ w).log_softmax(-1)).mean(-1), make_rng(0, "repeat"), 30)
        ends.append(policy.theta.detach())
    assert torch.equal(*ends)
    assert ends[0].abs().max() > 0
