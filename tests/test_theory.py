"""The theory behind gsil.py and irft.py: a chapter to be read in order. Every claim is a test of their losses.

There is one prompt and three possible responses, here called outcomes; a policy is three probabilities.

    p                       how often the demonstrators give each outcome: real responses y+ ~ p
    pi                      the same for the policy at the start of the round, the reference: y- ~ pi
    pi'                     the policy being trained; at step 0 it is pi
    d = log(pi'/pi)         the log-ratio, one number for each outcome
    h = scale * d + shift   what the losses see; positive means "real", negative "generated"

Every expectation below is a sum over the nine pairs of outcomes; nothing is sampled.
"""

import itertools
import math

import pytest
import torch
from helpers import Outcomes

import irft
from gsil import LOSSES
from irft import REWARD_LOSSES, advantages, clipped_loss, reward_loss

RATIO = ["logistic", "brier", "kliep", "lsif"]  # the losses that find the ratio p/pi itself
SMOOTH = [*RATIO, "spin"]  # hinge has kinks, where LBFGS gets stuck


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


P, PI = vector(0.6, 0.3, 0.1), vector(0.2, 0.3, 0.5)  # the example of the whole chapter


def close(found, expected, tolerance=1e-6):
    """1e-6 is for what an optimizer found, 5e-4 for 3 digits, 1e-12 for rounding."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0)


def without_mean(x):
    return x - x.mean()  # all that matters where a constant does not count


def random_logits(count):
    """(count, 3), the same ones every time."""
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expected_loss(loss, h, p, pi):
    """E loss(h(y+), h(y-)) over y+ ~ p and y- ~ pi, of one number per outcome."""
    real, generated = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)  # (9,): all pairs
    return (p[real] * pi[generated] * loss(h[real], h[generated])).sum()


def minimise(objective, *parameters):
    """Change the parameters in place until objective(), which is smooth, is smallest."""
    for parameter in parameters:
        parameter.requires_grad_()
    precise = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", **precise)

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


ANYWHERE = torch.eye(3, dtype=torch.float64)


def one_round(loss, p, pi, scale, shift=0.0, learned=(), features=ANYWHERE):
    """The policy after a round trained to its optimum, and with it what is `learned`, such as a shift. Its
    logits can move in the directions `features`, (directions, 3), by default in all."""
    weights = torch.zeros(len(features), dtype=torch.float64)  # 0: the reference

    def log_policy():
        return (pi.log() + weights @ features).log_softmax(-1)

    def objective():
        return expected_loss(LOSSES[loss], scale * (log_policy() - pi.log()) + shift, p, pi)

    minimise(objective, weights, *learned)
    return log_policy().detach().exp()


def closed_form(p, pi, scale):
    """pi (p/pi)^(1/scale) / Z, the hero of this chapter, and scale * log Z."""
    unnormalised = pi * (p / pi) ** (1 / scale)
    z = unnormalised.sum()
    return unnormalised / z, scale * z.log()


# ---- 1. What a loss knows: RATIO all of log p/pi, spin all but a constant (part 2), hinge the sign -----------


def test_hinge_finds_the_sign_only():
    """hinge would be said to know by how much p and pi differ, and not only which is larger."""
    grid = list(itertools.product([-2, -1, -0.5, 0, 0.5, 1, 2], repeat=3))  # its kinks, where minima are
    for p in (vector(0.6, 0.35, 0.05), vector(0.25, 0.35, 0.4)):
        losses = [expected_loss(LOSSES["hinge"], vector(*h), p, PI) for h in grid]
        assert grid[torch.stack(losses).argmin()] == (1, 1, -1)


# ---- 2. One round: what scale and shift do -----------------------------------------------------------------
#
# Now h is scale * log(pi'/pi) + shift. If it is to be log p/pi, then pi' is pi (p/pi)^(1/scale) exp(-shift/scale).
# It has to sum to one, which takes shift = scale * log Z.


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("loss", SMOOTH)
def test_a_round_reaches_the_closed_form(loss, scale):
    """The formula of all docstrings would be wrong, or a learned shift not find scale * log Z."""
    # spin needs no shift. At shift 0 the others stop short of the formula (except lsif at scale 1/2, by
    # luck: there E_pi[exp(2h)] is E_pi[pi'/pi], which is 1 for any policy).
    policy, right = closed_form(P, PI, scale)
    if scale == 0.5:  # by hand: (.2, .3, .5) * (9, 1, 1/25) = (1.8, .3, .02), so Z = 2.12
        close(policy, [0.849, 0.142, 0.009], 5e-4)
    if loss == "spin":
        close(one_round(loss, P, PI, scale), policy)
    else:
        shift = vector(0)
        close(one_round(loss, P, PI, scale, right), policy)
        close(one_round(loss, P, PI, scale, shift, learned=[shift]), policy)
        close(shift.detach(), right)
    if scale == 0.5 and loss not in ("spin", "lsif"):
        assert P[0] + 0.1 < one_round(loss, P, PI, scale)[0] < policy[0] - 0.05


# ---- 3. Many rounds: where they end ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.4, 0.5, 0.7, 1, 2])  # the factor is -1.5, -1, -.43, 0, 1/2
def test_a_round_multiplies_the_error_by_one_minus_one_over_scale(scale):
    """Rounds would be said to settle where they do not, that is, at a scale up to 1/2."""
    # The logarithm of the closed form is log(pi'/p) = (1 - 1/scale) log(pi/p) + constant. Near p, log Z is as
    # small as the squared error, so there the one-sided losses at shift 0 do the same.
    factor, policy = 1 - 1 / scale, PI
    for _ in range(3):
        before, policy = policy, one_round("spin", P, policy, scale)
        close(without_mean((policy / P).log()), factor * without_mean((before / P).log()), 1e-4)
    near = (P.log() + vector(0.001, 0, -0.001)).softmax(-1)
    for loss in RATIO:
        close((one_round(loss, P, near, scale) / P).log(), factor * (near / P).log(), 2e-5)


def first_gradient(loss, logits, scale, shift=0.0):
    """Of the expected loss at step 0: there d is 0, its gradient is not."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    value = expected_loss(loss, scale * (logp - logp.detach()) + shift, P, logp.detach().exp())
    return torch.autograd.grad(value, logits)[0]


TABLE = {  # name -> (loss at h+ = h- = 0, the same at 2, its slope for h+ at 0)
    "logistic": (1.3863, 2.2539, 1 / 2),
    "hinge": (2, 3, 1),
    "brier": (0.5, 0.7900, 1 / 4),
    "kliep": (1, 5.3891, 1),
    "lsif": (-0.5, 19.9100, 1),
    "spin": (0.6931, 0.6931, 1 / 2),  # a shift cancels in h+ - h-
    "linear": (0, 0, 1),  # of irft.py
}


@pytest.mark.parametrize("name", TABLE)
def test_the_first_step_of_a_round_is_a_step_of_sft(name):
    """Losses would seem to learn alike: the gradient is SFT's times scale * slope."""
    # The generated half is 0 on average at any shift, because E_pi[grad log pi] = grad sum(pi) = grad 1. So it is
    # noise at first, and a brake as soon as d is not 0.
    loss, (at_0, at_2, slope) = (irft.LOSSES | LOSSES)[name], TABLE[name]
    for shift, value in ((0, at_0), (2, at_2)):  # the first line of a log, where d = 0 and h = shift
        close(loss(vector(shift), vector(shift)), value, 5e-5)  # 4 digits above
    generated_half = lambda real, generated: loss(real.detach(), generated)
    for logits in random_logits(5):
        of_sft = logits.softmax(-1) - P  # the gradient of -E_p[log pi]
        close(first_gradient(loss, logits, 0.3), 0.3 * slope * of_sft, 1e-12)
        for shift in (-0.5, 0, 2):
            close(first_gradient(generated_half, logits, 1, shift), 0, 1e-12)


@pytest.mark.parametrize("loss", SMOOTH)
def test_endless_rounds_end_where_sft_ends(loss):
    """README would promise that rounds improve a model with which SFT has finished."""
    # This policy cannot reach p: it can only tilt, and its demonstrators have a dent in the middle. A round's
    # first gradient is SFT's, so rounds leave every point but SFT's, where the mean tilt is the demonstrators'.
    tilt, dented = vector(0, 1, 2), vector(0.6, 0.1, 0.3)
    policies = [(0.8 * tilt).softmax(-1)]
    for _ in range(25):
        policies.append(one_round(loss, dented, policies[-1], scale=1, features=tilt[None]))
    off = [abs(policy @ tilt - dented @ tilt).item() for policy in policies]
    assert off[-1] < 1e-5 and (off[1] < 1e-5) == (loss == "kliep")
    assert (policies[-1] - dented).abs().max() > 0.1


# ---- 4. Large h: a log-ratio, which is a sum over tokens, may be hundreds ----------------------------------


@pytest.mark.parametrize("loss", [*LOSSES.values(), *irft.LOSSES.values(), *REWARD_LOSSES.values()])
def test_no_loss_and_no_gradient_overflows(loss):
    """A single inf or nan, in float32 and at h up to 1000 in size, would end a run of days."""
    h = torch.tensor([-1e3, -100.0, -45.0, -5.0, 0.0, 5.0, 45.0, 100.0, 1e3])
    real, generated = (side.clone().requires_grad_() for side in torch.cartesian_prod(h, h).unbind(1))
    losses = loss(real, generated)
    losses.sum().backward()
    assert losses.isfinite().all() and real.grad.isfinite().all() and generated.grad.isfinite().all()


def test_beyond_5():
    """A clamp would give up on what is overrated most, or real responses rise forever."""
    for loss, push in (("kliep", math.exp(5)), ("lsif", math.exp(10))):
        generated = vector(5, 6, 1000).requires_grad_()
        LOSSES[loss](vector(0, 0, 0), generated).sum().backward()
        close(generated.grad / push, 1, 1e-9)
    for loss in (LOSSES["lsif"], irft.LOSSES["linear"]):
        real = vector(4.9, 5.1, 1000).requires_grad_()
        loss(real, vector(0, 0, 0)).sum().backward()
        assert real.grad[0] < 0 and (real.grad[1:] == 0).all()


# ---- 5. RFT, one round -------------------------------------------------------------------------------------
#
# Two players take turns. The reward r, a number for each outcome, lowers one of REWARD_LOSSES, so that y+ earns
# more than y-. The policy raises E_pi[r] - kl * KL(pi || pi_ref).

REWARD = vector(1, 0, -0.5)  # an example


def best_policy(r, kl, reference=PI):
    """pi_ref exp(r / kl) / Z: after the penalty all responses earn the same."""
    return (reference.log() + r / kl).softmax(-1)


def worth(policy, r, kl):
    """E_pi[r] - kl * KL(pi || pi_ref), which the policy raises."""
    return (policy * (r - kl * (policy / PI).log())).sum()


@pytest.mark.parametrize("kl", [0.1, 0.5, 2])
def test_the_best_policy_tilts_the_reference(kl):
    """RFT's formula would be wrong, or noise drive a policy away that has arrived there."""
    # By hand a policy is worth kl log Z - kl * KL(policy || best). At the best every response earns the same.
    best, log_z = best_policy(REWARD, kl), (PI * (REWARD / kl).exp()).sum().log()
    for policy in [best, *random_logits(20).softmax(-1)]:
        missing = kl * (policy * (policy / best).log()).sum()
        close(worth(policy, REWARD, kl), kl * log_z - missing, 1e-12)
    close(advantages((REWARD - kl * (best / PI).log())[None]), 0, 1e-12)


@pytest.mark.parametrize("samples", [2, 4])
def test_the_policy_gradient_is_right_on_average(samples):
    """A wrong sign, a lost factor, or the mean of all samples would move the optimum."""
    rewards = torch.tensor([[1.0, 2, 6], [7, 7, 10]])  # of two prompts; 7 more for all of a prompt cancel
    close(advantages(rewards), [[-3, -1.5, 4.5], [-1.5, -1.5, 3]])
    groups = torch.cartesian_prod(*[torch.arange(3)] * samples)  # (3 ** samples, samples): all that can occur
    for logits in random_logits(3):
        logits = logits.clone().requires_grad_()
        (exact,) = torch.autograd.grad(-worth(logits.softmax(-1), REWARD, 0.5), logits)
        logp = logits.log_softmax(-1)
        constant = logp.detach()  # in the script the objectives are numbers without a gradient
        gains = advantages((REWARD - 0.5 * (constant - PI.log()))[groups])
        losses = clipped_loss(logp[groups].flatten(), constant[groups].flatten(), gains.flatten())
        probability = constant.exp()[groups].prod(1)  # of each group
        mean = (probability * losses.view(groups.shape).mean(1)).sum()
        close(torch.autograd.grad(mean, logits)[0], exact, 1e-12)


def test_clip_stops_a_response_that_has_moved_far_enough():
    """Later passes over the same samples would go on without limit."""
    ratio, sampled = vector(0.5, 0.9, 1, 1.1, 1.5), vector(*[-20] * 5)
    for advantage, slopes in ((1, [-0.5, -0.9, -1, -1.1, 0]), (-1, [0, 0.9, 1, 1.1, 1.5])):
        logps = (sampled + ratio.log()).requires_grad_()
        clipped_loss(logps, sampled, vector(*[advantage] * 5)).sum().backward()
        close(logps.grad, slopes, 1e-12)  # at ratio 1 it is -advantage, REINFORCE


def fitted_reward(p, pi, before, penalty=0.0):
    """The best reward for y+ ~ p and y- ~ pi, found from that of the round before."""
    model, pairs = Outcomes(before), []
    for real, generated in itertools.product(range(3), repeat=2):
        pair = {"prompt_ids": [3], "real_ids": [real], "generated_ids": [generated]}
        pair |= {"real_before": float(before[real]), "generated_before": float(before[generated])}
        pairs.append(pair | {"weight": float(p[real] * pi[generated])})
    minimise(lambda: reward_loss(model, pairs, "logistic", penalty)[0].sum(), model.r)
    return model.r.detach()


# ---- 6. RFT, many rounds -----------------------------------------------------------------------------------
#
# The fit finds log p/pi_t, whatever it starts from, but the KL is always to the policy before all training. So it is
# the change of the reward that is fitted: then a round adds (log p - log pi_t)/kl to log pi_t, as SPIN's does.

START, SHOWN = vector(0.7, 0.2, 0.1), vector(0.2, 0.3, 0.5)  # pi_ref and p


def rft_rounds(kl, rounds, accumulate=True):
    """The policies of a run, the start first; each reward and each policy is at its optimum."""
    policies, reward = [START], torch.zeros(3, dtype=torch.float64)
    for _ in range(rounds):
        reward = fitted_reward(SHOWN, policies[-1], reward if accumulate else torch.zeros_like(reward))
        policies.append(best_policy(reward, kl, START))
    return policies


FIRST_OUTCOME = {
    0.5: [0.019, 0.7, 0.019],  # factor -1: there and back forever
    0.8: [0.119, 0.225, 0.194],  # -1/4: swings in on the demonstrators' .2
    1: [0.2, 0.2, 0.2],  # 0: one round is enough
    2: [0.444, 0.311, 0.252],  # 1/2: approaches from one side
}


@pytest.mark.parametrize("kl, first_outcome", FIRST_OUTCOME.items())
def test_a_round_of_rft_multiplies_the_error_by_one_minus_one_over_kl(kl, first_outcome):
    """Rounds of RFT would not end at the demonstrators, as those of GSIL do."""
    policies = rft_rounds(kl, 3)
    for before, policy in itertools.pairwise(policies):
        error_before, error = (without_mean((x / SHOWN).log()) for x in (before, policy))
        close(error, (1 - 1 / kl) * error_before, 1e-4)
    close([policy[0].item() for policy in policies[1:]], first_outcome, 5e-4)


def test_a_reward_that_does_not_accumulate_goes_back_to_the_start():
    """Nobody would see why a change of the reward is fitted: else at kl 1 rounds alternate."""
    for policy, expected in zip(rft_rounds(1, 4, accumulate=False), [START, SHOWN, START, SHOWN, START]):
        close(policy, expected)
    arrived = (SHOWN / START).log()
    close(fitted_reward(SHOWN, SHOWN, before=arrived, penalty=0.1), arrived)
