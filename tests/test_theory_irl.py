"""The theory behind irft.py, the chapter after test_theory.py: rewards. Every claim is a test again.

The setting is the same, one prompt and three outcomes; p and pi mean what they meant there. New are two
players who take turns:

    r         the reward, one number for each outcome. Its turn: lower a loss of REWARD_LOSSES, which compare
              a real response y+ ~ p with a generated one y- ~ pi: the real one shall earn more
    kl        the price of leaving pi_ref, the policy before all training. The policy's turn: raise
              E_pi[r] - kl * KL(pi || pi_ref), that is, earn reward, but not at any price

RFT plays this with a reward model; IRFT has none, its reward is scale * log(pi/pi_ref) itself. Expectations
are written out, nothing is sampled. "Fitted" means trained to the optimum.

    1. the policy's turn      which policy a reward asks for, and the gradient that leads there
    2. samples                advantages, ratio, clip: what stands in for the expectation
    3. the reward's turn      what a reward knows; one round of RFT is one round of SPIN
    4. many rounds            at p, between start and p, or nowhere: where the double loop ends
    5. the unseen action      what a bounded reward keeps and SFT does not
    6. IRFT                   the same without a reward model
"""

import pytest
import torch
from test_theory import (
    PI,
    P,
    all_pairs,
    close,
    closed_form,
    minimise,
    one_round,
    random_logits,
    sft_gradient,
    vector,
)

import gsil
from irft import LOSSES, REWARD_LOSSES, advantages, clipped_loss

REWARD = vector(1, 0, -0.5)  # an example; pi_ref is PI throughout


def best_policy(r, kl):
    """pi_ref exp(r / kl) / Z: the first test says that no policy is better."""
    return (PI.log() + r / kl).softmax(-1)


def worth(policy, r, kl):
    """E_pi[r] - kl * KL(pi || pi_ref), what the policy raises."""
    return (policy * (r - kl * (policy / PI).log())).sum()


def expected(loss, values, p, pi):
    """E loss(value of y+, value of y-) over y+ ~ p, y- ~ pi. Values, p and pi: (outcomes,)."""
    real, generated = torch.cartesian_prod(values, values).unbind(1)
    return (torch.cartesian_prod(p, pi).prod(1) * loss(real, generated)).sum()


def without_mean(x):
    """What is left of x when a constant does not count."""
    return x - x.mean()


# ---- 1. The policy's turn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.1, 0.5, 2])
def test_the_best_policy_tilts_the_reference(kl):
    """A policy is worth kl log Z - kl * KL(it || pi_ref exp(r/kl) / Z): most where that KL is 0.

    A small kl tilts a lot, a large one hardly. Every closed form below begins here.
    """
    best, log_z = best_policy(REWARD, kl), (PI * (REWARD / kl).exp()).sum().log()
    for policy in [best, *random_logits(20).softmax(-1)]:
        missing = kl * (policy * (policy / best).log()).sum()
        close(worth(policy, REWARD, kl), kl * log_z - missing, 1e-12)


def exact_gradient(logits, kl):
    """Of minus what the policy is worth, with respect to its logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(-worth(logits.softmax(-1), REWARD, kl), logits)[0]


def totals(logp, kl):
    """What each response earns: r - kl * log(pi/pi_ref), reward and price in one number."""
    return REWARD - kl * (logp - PI.log())


def policy_gradient(logits, kl, baseline=0.0):
    """The same gradient as irft.py takes it: the responses' losses, each as often as the policy writes it."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    losses = clipped_loss(logp, logp, totals(logp, kl) - baseline)
    return torch.autograd.grad((logp.detach().exp() * losses).sum(), logits)[0]


@pytest.mark.parametrize("kl", [0.1, 0.5, 2])
def test_the_policy_gradient_is_exact_at_every_policy(kl):
    """Nobody can differentiate a sample; -E_pi[total * grad log pi] needs no such thing and is the gradient.

    With a wrong sign or a lost factor the policy would head for another optimum. A constant, subtracted from
    all totals, changes nothing, since E_pi[grad log pi] = 0: part 2 will subtract what others earned. And at
    the best policy every response earns the same, kl log Z: no gradient, and no advantage, so a policy that
    has arrived is not even shaken by noise.
    """
    for logits in random_logits(10):
        exact = exact_gradient(logits, kl)
        assert exact.norm() > 1e-2
        for baseline in (0, -3, 10):
            close(policy_gradient(logits, kl, baseline), exact, 1e-12)
    best = best_policy(REWARD, kl).log()
    close(policy_gradient(best, kl), vector(0, 0, 0), 1e-12)
    close(advantages(totals(best, kl)[None]), torch.zeros(1, 3), 1e-12)


# ---- 2. Samples --------------------------------------------------------------------------------------------


def test_an_advantage_is_measured_against_the_other_samples():
    """Three samples of one prompt earn 1, 2, 6: the first is compared with (2 + 6) / 2, and so on.

    Rows sum to zero and prompts do not mix. A number added to all rewards of a prompt cancels: welcome, as
    part 3 leaves it unknown. Nothing is divided by the spread: half the reward is half the push.
    """
    rewards = torch.tensor([[1.0, 2, 6], [0, 0, 3]], dtype=torch.float64, requires_grad=True)
    found = advantages(rewards)
    close(found, [[-3, -1.5, 4.5], [-1.5, -1.5, 3]], 1e-12)
    close(advantages(rewards + torch.tensor([[7.0], [-2]])), found, 1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_advantages_are_right_on_average(samples):
    """All groups of 2, 3, 4 samples, each as often as it occurs: their mean gradient is the exact one.

    What the others earned is a constant to this sample. The mean of ALL samples is not, it contains it:
    with it, advantages and gradient would be too small by the factor (samples - 1) / samples.
    """
    groups = torch.cartesian_prod(*[torch.arange(3)] * samples)  # (3 ** samples, samples)
    for logits in random_logits(3):
        logits = logits.clone().requires_grad_()
        logp = logits.log_softmax(-1)
        rewards = totals(logp, kl=0.5)[groups]
        found = advantages(rewards)
        losses = clipped_loss(logp[groups].flatten(), logp[groups].flatten(), found.flatten())
        probability = logp.detach().exp()[groups].prod(1)  # of each group
        mean = (probability * losses.view(groups.shape).mean(1)).sum()
        close(torch.autograd.grad(mean, logits)[0], exact_gradient(logits, kl=0.5), 1e-12)
        small = rewards - rewards.mean(1, keepdim=True)
        close(small.detach(), found * (samples - 1) / samples, 1e-12)


def test_the_first_inner_step_is_reinforce():
    """The ratio is 1, the loss -A, and its slope -A per log-probability: clip has no say yet.

    Neither old log-probs nor advantages may receive a gradient. Through the former the ratio's would cancel,
    nothing would be learned. Through the latter comes that of kl * log pi, 0 on average, so part 1 cannot
    see it: pure noise. This test can.
    """
    logps = vector(-40, -3, -0.1).requires_grad_()  # sums over the tokens of whole responses
    old, earned = logps.detach().clone().requires_grad_(), vector(2, -1, 0.5).requires_grad_()
    losses = clipped_loss(logps, old, earned)
    losses.sum().backward()
    close(losses.detach(), -earned.detach(), 1e-12)
    close(logps.grad, -earned.detach(), 1e-12)
    assert old.grad is None and earned.grad is None


def test_clip_stops_a_response_that_has_moved_far_enough():
    """Good responses (A > 0) stop pushing at ratio 1 + clip, bad ones at 1 - clip: no gradient beyond.

    Later inner steps reuse samples of a policy that is gone. The ratio pi/old weighs them as the new policy
    would write them, which is exact but trusts few samples with much. On the other side nothing is clipped:
    a bad response that became likelier is pushed down all the harder.
    """
    ratio, old = vector(0.5, 0.9, 1.1, 1.5), vector(-20, -20, -20, -20)
    for earned, losses, slopes in [
        (1, [-0.5, -0.9, -1.1, -1.2], [-0.5, -0.9, -1.1, 0]),
        (-1, [0.8, 0.9, 1.1, 1.5], [0, 0.9, 1.1, 1.5]),
    ]:
        logps = (old + ratio.log()).requires_grad_()
        found = clipped_loss(logps, old, vector(*[earned] * 4))
        found.sum().backward()
        close(found.detach(), losses, 1e-12)
        close(logps.grad, slopes, 1e-12)


# ---- 3. The reward's turn ----------------------------------------------------------------------------------


def fitted_reward(p, pi):
    """The optimum of the logistic reward loss."""
    r = vector(0, 0, 0)
    minimise(lambda: expected(REWARD_LOSSES["logistic"], r, p, pi), r)
    return without_mean(r.detach())


def reward_gradient(loss, r, p, pi, penalty=0.0):
    """With respect to r, of the expected loss + penalty * (r+^2 + r-^2)."""
    r = r.clone().requires_grad_()
    value = expected(REWARD_LOSSES[loss], r, p, pi) + penalty * ((p + pi) * r**2).sum()
    return torch.autograd.grad(value, r)[0]


def test_a_fitted_reward_is_the_log_ratio_up_to_a_constant():
    """log p/pi: what demonstrators do more often than the policy earns more.

    A pair sees the difference of two rewards, no loss here can know what is added to both. Part 2 drops it.
    """
    r = fitted_reward(P, PI)
    close(r, without_mean((P / PI).log()))
    for loss in REWARD_LOSSES.values():
        close(expected(loss, r + 7, P, PI), expected(loss, r, P, PI), 1e-12)


@pytest.mark.parametrize("kl", [0.25, 0.5, 1, 2])
def test_one_round_of_rft_is_one_round_of_spin(kl):
    """Fit the reward, then the policy: pi_ref (p/pi_ref)^(1/kl) / Z, the hero of the chapter before.

    So kl is what scale is to SPIN and GSIL: 1 imitates, less goes past the demonstrators. IRFT in one chunk
    is such a round of SPIN: the same loss to the last digit. If these methods differ after one fitted round,
    then by optimizers, sampling and networks, not by their objectives.
    """
    policy = best_policy(fitted_reward(P, PI), kl)
    close(policy, closed_form(P, PI, kl)[0])
    close(policy, one_round("spin", P, PI, scale=kl))
    real, generated = random_logits(50).T[:2]
    assert torch.equal(LOSSES["spin"](real, generated), gsil.LOSSES["spin"](real, generated))


def test_the_linear_reward_loss_has_no_minimum():
    """The gradient of -(r+ - r-) is pi - p at every r: IRL's own, E_demo - E_pi, and it never gets flat.

    The loss falls for ever. It can only be followed for some steps (K on the same samples are one step K
    times as long), or be held by a bound or a penalty.
    """
    for size in (0, 1, 1e3):
        close(reward_gradient("linear", size * (P - PI), P, PI), PI - P, 1e-9)
        fallen = expected(REWARD_LOSSES["linear"], size * (P - PI), P, PI)
        close(fallen, -size * ((P - PI) ** 2).sum(), 1e-9)


@pytest.mark.parametrize("penalty", [0.01, 0.5, 3])
def test_a_penalty_gives_the_linear_loss_a_minimum(penalty):
    """With penalty * (r+^2 + r-^2) it is at r = (p - pi) / (p + pi) / (2 penalty).

    Which is never beyond 1/(2 penalty): a penalty is a bound in disguise. And it makes the constant known.
    """
    r = (P - PI) / (P + PI) / (2 * penalty)
    close(reward_gradient("linear", r, P, PI, penalty), vector(0, 0, 0), 1e-12)  # the loss is convex
    assert r.abs().max() < 1 / (2 * penalty)


@pytest.mark.parametrize("loss", [*REWARD_LOSSES.values(), *LOSSES.values()])
def test_large_rewards_do_not_overflow(loss):
    """-log(sigmoid(-200)), spelled like this in float32, is infinite, its gradient nan: the end of a run.

    By hand: a pair that is wrong by 200 costs logistic 200, one that is right by 200 nothing.
    """
    real, generated = all_pairs(torch.tensor([-1e3, -100.0, 0.0, 100.0, 1e3]))
    losses = loss(real, generated)
    losses.sum().backward()
    assert losses.shape == (25,) and losses.isfinite().all()
    assert real.grad.isfinite().all() and generated.grad.isfinite().all()
    if loss is REWARD_LOSSES["logistic"]:
        close(losses.view(5, 5)[[1, 3], [3, 1]].detach(), [200, 0])


# ---- 4. Many rounds ----------------------------------------------------------------------------------------
#
# Each round samples from the policy of the moment, gives the reward its turn, then fits the policy. The KL is
# to the policy before all training, in every round. (In SPIN and IRFT the reference moves along: part 6.)


def continued(loss, p, kl, step, rounds, penalty=0.0, bound=float("inf")):
    """The last policy of a double loop whose reward goes on from round to round, one step in each."""
    r = vector(0, 0, 0)
    for _ in range(rounds):
        r = r - step * reward_gradient(loss, r, p, best_policy(r, kl), penalty)
        r = r.clamp(-bound, bound)
    return best_policy(r, kl)


@pytest.mark.parametrize("kl", [0.1, 0.5])
def test_small_linear_steps_lead_to_the_demonstrators(kl):
    """r moves by step * (p - pi), so it rests where pi = p and nowhere else, whatever kl is.

    This is dual ascent: rewards are the prices of the constraint "each outcome as often as with p". Prices
    must move slowly: step/kl below 4 is safe for any p, for this one below 2 / curvature = 4.9, with the
    curvature of SFT's loss at p (the next test says why); beyond, the policy swings around p for ever.
    """
    for ratio in (0.2, 3, 4.8):
        close(continued("linear", P, kl, ratio * kl, rounds=400), P, 1e-5)
    curvature = torch.linalg.eigvalsh(torch.diag(P) - torch.outer(P, P)).max()
    close(2 / curvature, 4.91, 5e-3)
    assert (continued("linear", P, kl, 5 * kl, rounds=400) - P).abs().max() > 0.05
    swing = [continued("linear", P, kl, 6 * kl, rounds)[0] for rounds in (200, 201, 202)]
    close(swing, [0.326, 0.874, 0.326], 5e-4)


def sft(p, learning_rate, steps):
    logits = PI.log().clone()
    for _ in range(steps):
        logits = logits - learning_rate * sft_gradient(logits, p)
    return logits.softmax(-1)


def test_small_linear_steps_are_sft():
    """log pi moves by step/kl * (p - pi): gradient ascent on the likelihood of the demonstrations.

    With a free reward per outcome the whole game is SFT with learning rate step/kl. What IRL adds is in the
    reward, a bound (part 5) or a network that judges what it has not seen, and in stopping early. RFT that
    ends where SFT ends has not failed, it has converged.
    """
    for rounds in (1, 2, 10, 50):
        close(continued("linear", P, kl=0.5, step=0.4, rounds=rounds), sft(P, 0.4 / 0.5, rounds), 1e-12)


def between(kl):
    """pi_ref (p/pi_ref)^(1/(1 + kl)) / Z: here the fitted reward, log p/pi, asks for the pi it judges."""
    return closed_form(P, PI, 1 + kl)[0]


@pytest.mark.parametrize(
    "kl, first_outcome",
    [
        (0.5, [0.849, 0.002, 0.998]),  # swings ever wider
        (1, [0.6, 0.2, 0.6, 0.2]),  # p, the start, p, the start
        (2, [0.398, 0.293, 0.345, 0.319]),  # settles, far from the demonstrators' .6
    ],
)
def test_a_reward_refitted_to_the_last_round_flips(kl, first_outcome):
    """A round multiplies the error by -1/kl: the distance from a policy between start and p, not from p.

    The new reward judges the last policy, but the next one starts from pi_ref again: what the last one did
    too often is punished in one that does it too seldom. Whether the reward model starts afresh makes no
    difference: fitted is fitted. So at kl 1 and below one round on the last pairs is enough, or else the
    reward must not be fitted.
    """
    policy, found = PI, []
    for _ in first_outcome:
        before, policy = policy, best_policy(fitted_reward(P, policy), kl)
        error_before, error = [without_mean((x / between(kl)).log()) for x in (before, policy)]
        close(error, -error_before / kl, 1e-4)
        found.append(policy[0].item())
    close(found, first_outcome, 5e-4)


@pytest.mark.parametrize("kl, first_outcome", [(0.1, 0.566), (0.5, 0.469), (1, 0.398)])
def test_all_rounds_or_small_logistic_steps_end_between_start_and_p(kl, first_outcome):
    """Two ways not to flip: y- from all policies so far, each as often, or a reward that takes small steps.

    Both rest where reward and policy agree, at the closed form with 1 + kl instead of kl: in the end not past
    p, not even at it. (With all pairs at kl .1 the first rounds still jump, from 1.00 to .00 and back.) So
    the choice of the reward loss decides where endless small steps end: linear at p, logistic short of it.
    """
    policies = [PI]
    for _ in range(40):
        policies.append(best_policy(fitted_reward(P, torch.stack(policies).mean(0)), kl))
    close(policies[-1], between(kl), 5e-4)
    close(between(kl)[0], first_outcome, 5e-4)
    close(continued("logistic", P, kl, step=0.3, rounds=600), between(kl), 1e-5)


# ---- 5. The unseen action ----------------------------------------------------------------------------------
#
# pi_ref does the third thing half of the time, SHOWN does not contain it: is it bad, or is SHOWN too short?

SHOWN = vector(0.7, 0.3, 0)


def test_sft_and_unrestricted_rewards_forget_what_is_not_shown():
    """The longer they train, the closer to 0: nothing in these objectives ever says "enough".

    So IRL as such does not save the third action. Whoever tells the example must name the bound.
    """
    for train in (
        lambda steps: sft(SHOWN, 1, steps),
        lambda steps: continued("linear", SHOWN, kl=0.5, step=0.5, rounds=steps),
        lambda steps: continued("logistic", SHOWN, kl=0.5, step=0.5, rounds=steps),
    ):
        unseen = [train(steps)[2].item() for steps in (10, 100, 1000)]
        assert 0.2 > unseen[0] > 3 * unseen[1] > 9 * unseen[2] and unseen[2] < 0.01


@pytest.mark.parametrize("kl, unseen", [(0.5, 0.031), (1, 0.177)])
def test_a_bounded_reward_keeps_the_unseen_action(kl, unseen):
    """|r| <= 1: nothing worse than -1 can be said of it. By hand, for linear: r ends at (1, something, -1).

    "Something" makes the second action as frequent as shown; the remaining .7 the others share like
    .2 exp(1/kl) and .5 exp(-1/kl). logistic ends nearby. If that is right, it is pi_ref's merit.
    """
    first, second, third = PI * torch.exp(vector(1, 0, -1) / kl)
    linear = continued("linear", SHOWN, kl, step=0.5, rounds=400, bound=1)
    close(linear, [0.7 * first / (first + third), 0.3, 0.7 * third / (first + third)])
    close(linear[2], unseen, 5e-4)
    assert continued("logistic", SHOWN, kl, step=0.5, rounds=400, bound=1)[2] > 0.8 * unseen


@pytest.mark.parametrize("kl, penalty, unseen", [(0.5, 0.5, 0.116), (1, 0.25, 0.116), (1, 0.5, 0.254)])
def test_a_penalised_reward_keeps_the_unseen_action(kl, penalty, unseen):
    """Its reward ends at -1/(2 penalty), as part 3 says; how much of it that leaves, kl * penalty decides.

    A bound can be too far away to matter: penalty .01 at kl .1 would keep about e^-500 of it.
    """
    end = continued("linear", SHOWN, kl, step=0.4, rounds=400, penalty=penalty)
    close(end[2], unseen, 5e-4)
    close(end, best_policy((SHOWN - end) / (SHOWN + end) / (2 * penalty), kl), 1e-4)


# ---- 6. IRFT -----------------------------------------------------------------------------------------------
#
# The reward is h = scale * log(pi/pi_ref), so both turns are one step; pi_ref is the policy at the start of
# the chunk. Its spin is SPIN's, so what test_theory.py says about many rounds holds: each chunk, fitted,
# multiplies the error, here the distance from p itself, by 1 - 1/scale.


@pytest.mark.parametrize("loss, slope", [("linear", 1), ("spin", 1 / 2)])
def test_the_first_step_of_a_chunk_is_a_step_of_sft(loss, slope):
    """The raw IRL gradient, `linear`, is twice that of spin, pair by pair: the same direction at first.

    On average it is SFT's, times scale: the generated half cancels. A chunk of one step has only a first
    step, so as T grows towards the number of steps, IRFT becomes SFT plus noise. What sets it apart happens
    later in a chunk.
    """
    real, generated = all_pairs(vector(0, 0))
    LOSSES[loss](real, generated).sum().backward()
    close(real.grad, [-slope] * 4, 1e-12)
    close(generated.grad, [slope] * 4, 1e-12)
    for scale in (0.1, 1):
        for logits in random_logits(5):
            moving = logits.clone().requires_grad_()
            h = scale * (moving.log_softmax(-1) - logits.log_softmax(-1))
            value = expected(LOSSES[loss], h, P, logits.softmax(-1))
            close(torch.autograd.grad(value, moving)[0], scale * slope * sft_gradient(logits, P), 1e-12)
