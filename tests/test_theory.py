"""The theory behind gsil.py and irft.py: a chapter to be read in order. Every claim is a test of their losses.

The setting is the smallest one in which there is something to say: one prompt, and three possible responses,
here called outcomes. No network, no tokens; a policy is three probabilities.

    p                       how often the demonstrators give each outcome: real responses y+ ~ p
    pi                      the same for the policy when the round starts: generated responses y- ~ pi;
                            also the reference, which stands still during the round
    pi'                     the policy being trained; at step 0 it is pi
    d = log(pi'/pi)         the log-ratio, one number for each outcome
    h = scale * d + shift   what the losses see: the answer to "real or generated?", positive for real

All pairs of three outcomes are only nine, so each expectation below is written out: nothing is sampled, no
answer depends on luck. Two kinds of loss occur. The one-sided ones, a(h+) + b(h-), judge every response by
itself: logistic, hinge, brier, kliep, lsif. spin is pairwise: it sees the difference h+ - h- alone.

    1. what a loss knows      which h each of them makes of p and pi
    2. one round              which policy that is: what scale and shift do
    3. many rounds            where they end, and that this is where SFT ends
    4. large h                what keeps the exponentials finite
    5. RFT, one round         the reward's turn, the policy's turn: one round of spin again
    6. RFT, many rounds       at p, between start and p, or nowhere
"""

import itertools
import math

import pytest
import torch
from make_toy import HASTY

import irft
from gsil import LOSSES, tangent_exp
from irft import REWARD_LOSSES, advantages, clipped_loss

RATIO = ["logistic", "brier", "kliep", "lsif"]  # the one-sided losses that find the ratio p/pi itself
SMOOTH = [*RATIO, "spin"]  # hinge has kinks, where LBFGS gets stuck


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


P, PI = vector(0.6, 0.3, 0.1), vector(0.2, 0.3, 0.5)  # the example of the whole chapter


def close(found, expected, tolerance=1e-6):
    """Same numbers: up to 1e-6 for what an optimizer found, 5e-4 for what is written here in 3 digits, 1e-12
    for what float64 only rounds."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected.expand(found.shape), atol=tolerance, rtol=0)


def without_mean(x):
    """What is left of x when a constant does not count."""
    return x - x.mean()


def random_logits(count):
    """(count, 3), the same ones every time."""
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expected_loss(loss, h, p, pi):
    """E loss(h(y+), h(y-)) over y+ ~ p, y- ~ pi. Arguments (outcomes,), or (prompts, outcomes): the sum."""
    real, generated = torch.broadcast_tensors(h[..., :, None], h[..., None, :])
    probability = p[..., :, None] * pi[..., None, :]  # of each pair: (..., outcomes, outcomes)
    return (probability.flatten() * loss(real.flatten(), generated.flatten())).sum()


def minimise(objective, *parameters):
    """Change the parameters in place until objective() is as small as it gets. For smooth objectives."""
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


def one_round(loss, p, pi, scale, shift=0.0, learned=(), features=None):
    """The policy after a round trained to its optimum, and with it what is `learned`, such as a shift. Its
    logits can move in directions `features`, (directions, outcomes); by default in all."""
    features = torch.eye(pi.shape[-1], dtype=torch.float64) if features is None else features
    weights = torch.zeros(*pi.shape[:-1], len(features), dtype=torch.float64)  # 0: the reference

    def log_policy():
        return (pi.log() + weights @ features).log_softmax(-1)

    def objective():
        return expected_loss(LOSSES[loss], scale * (log_policy() - pi.log()) + shift, p, pi)

    minimise(objective, weights, *learned)
    return log_policy().detach().exp()


def closed_form(p, pi, scale):
    """pi (p/pi)^(1/scale) / Z, the hero of this chapter, and scale * log Z."""
    unnormalised = pi * (p / pi) ** (1 / scale)
    z = unnormalised.sum(-1, keepdim=True)
    return unnormalised / z, scale * z.log()


# ---- 1. What a loss knows ----------------------------------------------------------------------------------

TABLE = {  # name -> (loss at h+ = h- = 0, the same at 2, its slope for h+ at 0)
    "logistic": (1.3863, 2.2539, 1 / 2),
    "hinge": (2, 3, 1),
    "brier": (0.5, 0.7900, 1 / 4),
    "kliep": (1, 5.3891, 1),
    "lsif": (-0.5, 19.9100, 1),
    "spin": (0.6931, 0.6931, 1 / 2),  # a shift cancels in h+ - h-
    "linear": (0, 0, 1),  # of irft.py
}
ALL = irft.LOSSES | LOSSES


@pytest.mark.parametrize("name", TABLE)
def test_losses_before_the_first_step(name):
    """Policy == reference: d = 0, h = shift. Compare these values, one for each pair of a batch, with the
    first line of a training log."""
    for shift, value in zip((0, 2), TABLE[name]):
        h = vector(shift, shift, shift)
        close(ALL[name](h, h), vector(value, value, value), 5e-5)  # 4 digits above


FAMILY = {  # name -> (loss, its convex phi, a constant that no gradient sees)
    "logistic": (LOSSES["logistic"], lambda r: r * r.log() - (1 + r) * (1 + r).log(), 0),
    "brier": (LOSSES["brier"], lambda r: 1 / (1 + r), 1),
    "kliep": (LOSSES["kliep"], lambda r: r * r.log() - r, 0),
    "lsif": (LOSSES["lsif"], lambda r: (r - 1) ** 2 / 2, -0.5),
    "root": (lambda a, b: tangent_exp(-a / 2) + tangent_exp(b / 2), lambda r: -2 * r.sqrt(), 0),
}


@pytest.mark.parametrize("name", FAMILY)
def test_one_family_finds_the_log_ratio(name):
    """Each is -phi'(r+) + r- phi'(r-) - phi(r-), r = exp(h), and its best h, any three numbers, is log p/pi.

    On average the formula says how far the tangent of phi at r is below phi at p/pi (a Bregman divergence):
    no r is better than p/pi. A forgotten 1/2 on one side would leave all signs right and move the optimum.
    A new phi is a new loss: root, of README, is one.
    """
    loss, phi, constant = FAMILY[name]
    grid = torch.linspace(-5, 5, 41, dtype=torch.float64)  # beyond it: part 4
    real, generated = torch.cartesian_prod(grid, grid).unbind(1)
    r_real, r_generated = real.exp().requires_grad_(), generated.exp().requires_grad_()
    (slope_real,) = torch.autograd.grad(phi(r_real).sum(), r_real)
    (slope_generated,) = torch.autograd.grad(phi(r_generated).sum(), r_generated)
    bregman = -slope_real + r_generated * slope_generated - phi(r_generated)
    close(loss(real, generated) - bregman.detach(), constant, 1e-9)  # of numbers up to e^10
    h = vector(0, 0, 0)
    minimise(lambda: expected_loss(loss, h, P, PI), h)
    close(h.detach(), (P / PI).log())  # (1.099, 0, -1.609)


def test_spin_finds_the_log_ratio_up_to_a_constant():
    """A loss of h+ - h- cannot know a number that is added to both. The differences it gets right."""
    h, spin = vector(0, 0, 0), LOSSES["spin"]
    minimise(lambda: expected_loss(spin, h, P, PI), h)
    close(without_mean(h.detach()), without_mean((P / PI).log()))
    close(expected_loss(spin, h + 7, P, PI).detach(), expected_loss(spin, h, P, PI).detach(), 1e-12)


def test_hinge_finds_the_sign_only():
    """Demonstrators far from pi and near it, and hinge says (1, 1, -1) to both: which of p and pi is larger,
    not by how much. (Its minimum is at a kink: instead of an optimizer, a grid that contains the kinks.)"""
    grid = list(itertools.product([-2, -1, -0.5, 0, 0.5, 1, 2], repeat=3))
    for p in (vector(0.6, 0.35, 0.05), vector(0.25, 0.35, 0.4)):
        losses = [expected_loss(LOSSES["hinge"], vector(*h), p, PI) for h in grid]
        assert grid[torch.stack(losses).argmin()] == (1, 1, -1)


# ---- 2. One round: what scale and shift do -----------------------------------------------------------------
#
# From now on h is not free: it is scale * log(pi'/pi) + shift, and pi' has to sum to one. If h is to be
# log p/pi, then pi' is pi (p/pi)^(1/scale) exp(-shift/scale): a sum of one needs shift = scale * log Z.


def test_the_closed_form_by_hand():
    """Scale 1/2 squares p/pi: (.2, .3, .5) * (9, 1, 1/25) = (1.8, .3, .02), and Z = 2.12. The demonstrators
    give the first outcome 60 %, the new policy 85 %: it goes past them. Scale 1 lands on p at shift 0."""
    policy, shift = closed_form(P, PI, 0.5)
    close(policy, [0.849, 0.142, 0.009], 5e-4)
    close(shift, 0.376, 5e-4)
    close(torch.cat(closed_form(P, PI, 1)), [*P, 0], 1e-12)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("loss", SMOOTH)
def test_a_round_reaches_the_closed_form(loss, scale):
    """With the right shift, scale * log Z, all do. Nobody knows Z, but a shift that is trained with the policy,
    `--shift learn`, finds it. spin needs none: that pi' sums to one fixes its constant. At shift 0 the others
    are timid (but lsif at 1/2, by luck: E_pi[exp(2h)] is E_pi[pi'/pi] = 1 for any policy)."""
    policy, right = closed_form(P, PI, scale)
    if loss == "spin":
        close(one_round(loss, P, PI, scale), policy)
    else:
        shift = vector(0)
        close(one_round(loss, P, PI, scale, right), policy)
        close(one_round(loss, P, PI, scale, shift, learned=[shift]), policy)
        close(shift.detach(), right)
    if scale == 0.5 and loss not in ("spin", "lsif"):
        assert P[0] + 0.1 < one_round(loss, P, PI, scale)[0] < policy[0] - 0.05


@pytest.mark.parametrize("loss", RATIO)
def test_one_shift_for_all_prompts_is_a_compromise(loss):
    """Two prompts, scale 1/4: the right shifts are .70 and .08, and the learned one lies between them. So the
    prompt that asks for a large change gets too little of it, the other one too much."""
    p, pi = torch.stack([P, vector(0.4, 0.3, 0.3)]), torch.stack([PI, vector(0.3, 0.3, 0.4)])
    exact, right = closed_form(p, pi, 0.25)  # (2 prompts, 3 outcomes), (2, 1)
    shift = vector(0)
    policy = one_round(loss, p, pi, 0.25, shift, learned=[shift])
    assert right[1] + 0.1 < shift < right[0] - 0.1
    assert policy[0, 0] < exact[0, 0] - 0.02 and policy[1, 0] > exact[1, 0] + 0.1


@pytest.mark.parametrize("scale, predicted", [(1.5, 0.54), (1, 0.65), (0.5, 0.89), (0.3, 0.99)])
def test_what_the_closed_form_says_about_the_toy(scale, predicted):
    """An answer there is worked or hasty, two outcomes; problems have 2, 3 or 4 steps. The closed form is a
    straight line in the log-odds: so the habits of both, HASTY, predict how many answers will show their
    working after one round. README and RESULTS.md put what was measured beside it."""
    base, demonstrators = (1 - vector(*HASTY[writer].values()) for writer in ("base", "demo"))  # worked
    pi, p = (torch.stack([worked, 1 - worked], -1) for worked in (base, demonstrators))  # (3 numbers, 2)
    worked = one_round("spin", p, pi, scale)[:, 0]
    close(worked.logit(), base.logit() + (demonstrators.logit() - base.logit()) / scale, 1e-5)
    close(worked.mean(), predicted, 0.01)


# ---- 3. Many rounds: where they end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, first_outcome",
    [
        (0.4, [0.910, 0.012, 0.988]),  # factor -1.5: swings ever wider around the demonstrators' .6
        (0.5, [0.849, 0.2, 0.849]),  # -1: there and back for ever
        (0.7, [0.733, 0.530, 0.628]),  # -.43: swings in
        (1, [0.6, 0.6, 0.6]),  # 0: one round is enough
        (2, [0.398, 0.5035, 0.553]),  # 1/2: creeps up from one side
    ],
)
def test_a_round_multiplies_the_error_by_one_minus_one_over_scale(scale, first_outcome):
    """The logarithm of the closed form is log(pi'/p) = (1 - 1/scale) log(pi/p) + constant. So rounds settle at
    the demonstrators if scale > 1/2; below, more rounds do harm. Close to p, log Z is as small as the error
    squared: there the one-sided losses at shift 0 do the same, no choice of loss makes many rounds safe."""
    factor, policy, found = 1 - 1 / scale, PI, []
    for _ in first_outcome:
        before, policy = policy, one_round("spin", P, policy, scale)
        close(without_mean((policy / P).log()), factor * without_mean((before / P).log()), 1e-4)
        found.append(policy[0].item())
    close(found, first_outcome, 5e-4)
    near = (P.log() + vector(0.001, 0, -0.001)).softmax(-1)
    for loss in RATIO:
        close((one_round(loss, P, near, scale) / P).log(), factor * (near / P).log(), 2e-5)


def sft_gradient(logits, p):
    """Of SFT's expected loss, -E_p[log pi], with respect to the policy's logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(-(p * logits.log_softmax(-1)).sum(), logits)[0]


def first_gradient(loss, logits, scale, shift=0.0):
    """Of the expected loss at step 0: there d is 0, its gradient is not."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    value = expected_loss(loss, scale * (logp - logp.detach()) + shift, P, logp.detach().exp())
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("name", TABLE)
def test_the_first_step_of_a_round_is_a_step_of_sft(name):
    """At shift 0 the gradient is SFT's, times scale, times the slope of the loss at h = 0: learning rates of
    different losses and scales are not comparable. For the generated half is 0, at any shift: E_pi[grad log
    pi] = grad sum(pi) = grad 1. It is noise at first, and a brake as soon as d is not 0."""
    loss, slope = ALL[name], TABLE[name][2]
    generated_half = lambda real, generated: loss(real.detach(), generated)
    for logits in random_logits(5):
        close(first_gradient(loss, logits, 0.3), 0.3 * slope * sft_gradient(logits, P), 1e-12)
        for shift in (-0.5, 0, 2):
            close(first_gradient(generated_half, logits, 1, shift), 0, 1e-12)


@pytest.mark.parametrize("loss", SMOOTH)
def test_endless_rounds_end_where_sft_ends(loss):
    """This policy cannot reach p: it can only tilt, and its demonstrators have a dent in the middle. Whatever
    the loss, a round's first gradient is SFT's, so it moves away from every point but SFT's, where the mean
    tilt is the demonstrators'. One round ends elsewhere, but kliep's at scale 1, which is SFT."""
    tilt, dented = vector(0, 1, 2), vector(0.6, 0.1, 0.3)
    policies = [(0.8 * tilt).softmax(-1)]
    for _ in range(25):
        policies.append(one_round(loss, dented, policies[-1], scale=1, features=tilt[None]))
    off = [abs(policy @ tilt - dented @ tilt).item() for policy in policies]
    assert off[-1] < 1e-5 and (off[1] < 1e-5) == (loss == "kliep")
    assert (policies[-1] - dented).abs().max() > 0.1


def test_kliep_at_scale_1_is_sft():
    """E_p[-d] + E_pi[exp d], and E_pi[pi'/pi] = sum(pi') = 1 for any policy: SFT's loss plus a constant. What
    kliep gains over SFT there is the optimizer's merit, not the loss's."""
    for logits in random_logits(20):
        policy = logits.softmax(-1)
        sft, constant = -(P * policy.log()).sum(), (P * PI.log()).sum() + 1
        close(expected_loss(LOSSES["kliep"], (policy / PI).log(), P, PI), sft + constant, 1e-12)


# ---- 4. Large h: what keeps the exponentials finite --------------------------------------------------------
#
# The log-ratio of a long response is a sum over its tokens: hundreds are no accident. exp(90) is infinite in
# float32, and on finite data nothing stops -exp(h+), the real side of lsif, from falling for ever.


@pytest.mark.parametrize("loss", [*LOSSES.values(), *irft.LOSSES.values(), *REWARD_LOSSES.values()])
def test_no_loss_and_no_gradient_overflows(loss):
    """In float32 and for every pair of h up to 1000 in size: a single inf or nan would end a run of days."""
    h = torch.tensor([-1e3, -100.0, -45.0, -5.0, 0.0, 5.0, 45.0, 100.0, 1e3])
    real, generated = (side.clone().requires_grad_() for side in torch.cartesian_prod(h, h).unbind(1))
    losses = loss(real, generated)
    losses.sum().backward()
    assert losses.isfinite().all() and real.grad.isfinite().all() and generated.grad.isfinite().all()


@pytest.mark.parametrize("loss, push", [("kliep", math.exp(5)), ("lsif", math.exp(10))])
def test_beyond_5_generated_responses_are_still_pushed_down(loss, push):
    """The exponential goes on as its tangent: its slope stays what it is at 5, it cannot explode or fade. A
    plain clamp would give up on the very response that the policy overrates most."""
    generated = vector(5, 6, 50, 1000).requires_grad_()
    losses = LOSSES[loss](vector(0, 0, 0, 0), generated)
    losses.sum().backward()
    close(generated.grad / push, 1, 1e-9)
    close((losses - losses[0]).detach() / push, [0, 1, 45, 995], 1e-9)


def test_beyond_5_real_responses_are_not_rewarded_any_more():
    """-exp(h+) of lsif and irft.py's linear have no minimum, so a clamp and no tangent: a real response that
    has become e^5 times likelier is learned."""
    for loss in (LOSSES["lsif"], irft.LOSSES["linear"]):
        real, generated = vector(4.9, 5.1, 1e3).requires_grad_(), vector(-4.9, -5.1, -1e3).requires_grad_()
        loss(real, generated).sum().backward()
        assert real.grad[0] < 0 and (real.grad[1:] == 0).all()
    assert generated.grad.tolist() == [1, 0, 0]  # linear's other side


# ---- 5. RFT, one round -------------------------------------------------------------------------------------
#
# New are two players who take turns. The reward r, a number for each outcome, lowers one of REWARD_LOSSES: y+
# shall earn more than y-. The policy raises E_pi[r] - kl * KL(pi || pi_ref): it earns reward, but not at any
# price. RFT has a reward model. IRFT has none: its reward is h itself, so a chunk is a round of spin.

REWARD = vector(1, 0, -0.5)  # an example; pi_ref is PI throughout


def best_policy(r, kl):
    """pi_ref exp(r / kl) / Z: the next test says that no policy is better."""
    return (PI.log() + r / kl).softmax(-1)


def worth(policy, r, kl):
    """E_pi[r] - kl * KL(pi || pi_ref), what the policy raises."""
    return (policy * (r - kl * (policy / PI).log())).sum()


@pytest.mark.parametrize("kl", [0.1, 0.5, 2])
def test_the_best_policy_tilts_the_reference(kl):
    """A policy is worth kl log Z - kl * KL(it || pi_ref exp(r/kl) / Z): most where that KL is 0. There every
    response earns the same, so a policy that has arrived is not even shaken by noise: no advantage is left."""
    best, log_z = best_policy(REWARD, kl), (PI * (REWARD / kl).exp()).sum().log()
    for policy in [best, *random_logits(20).softmax(-1)]:
        missing = kl * (policy * (policy / best).log()).sum()
        close(worth(policy, REWARD, kl), kl * log_z - missing, 1e-12)
    close(advantages((REWARD - kl * (best / PI).log())[None]), 0, 1e-12)


@pytest.mark.parametrize("samples", [2, 4])
def test_the_policy_gradient_is_right_on_average(samples):
    """An advantage is what a sample earns, compared with the mean of its prompt's others. Over all groups, each
    as often as it occurs, the mean gradient is the exact one: a wrong sign, a lost factor or the mean of ALL
    samples, which contains this one, would lead to another optimum."""
    rewards = torch.tensor([[1.0, 2, 6], [7, 7, 10]])  # of two prompts; 7 more for all of a prompt cancel
    close(advantages(rewards), [[-3, -1.5, 4.5], [-1.5, -1.5, 3]])
    groups = torch.cartesian_prod(*[torch.arange(3)] * samples)  # (3 ** samples, samples)
    for logits in random_logits(3):
        logits = logits.clone().requires_grad_()
        (exact,) = torch.autograd.grad(-worth(logits.softmax(-1), REWARD, 0.5), logits)
        logp = logits.log_softmax(-1)
        gains = advantages((REWARD - 0.5 * (logp - PI.log()))[groups])
        assert not gains.requires_grad  # that of kl * log pi is 0 on average: pure noise
        losses = clipped_loss(logp[groups].flatten(), logp[groups].flatten(), gains.flatten())
        probability = logp.detach().exp()[groups].prod(1)  # of each group
        mean = (probability * losses.view(groups.shape).mean(1)).sum()
        close(torch.autograd.grad(mean, logits)[0], exact, 1e-12)


def test_clip_stops_a_response_that_has_moved_far_enough():
    """At the first inner step the ratio is 1, the loss -A, its slope -A: REINFORCE. Later good responses
    (A > 0) stop pushing at ratio 1.2, bad ones at .8, but not on the other side: a bad response that became
    likelier is pushed down all the harder. What was sampled and earned gets no gradient: it would be noise."""
    ratio = vector(0.5, 0.9, 1, 1.1, 1.5)
    for earned, losses, slopes in [
        (1, [-0.5, -0.9, -1, -1.1, -1.2], [-0.5, -0.9, -1, -1.1, 0]),
        (-1, [0.8, 0.9, 1, 1.1, 1.5], [0, 0.9, 1, 1.1, 1.5]),
    ]:
        old, gains = vector(*[-20] * 5).requires_grad_(), vector(*[earned] * 5).requires_grad_()
        logps = (old + ratio.log()).detach().requires_grad_()
        found = clipped_loss(logps, old, gains)
        found.sum().backward()
        close(found.detach(), losses, 1e-12)
        close(logps.grad, slopes, 1e-12)
        assert old.grad is None and gains.grad is None


def fitted_reward(p, pi):
    """The optimum of the logistic reward loss: log p/pi + a constant, which advantages drop."""
    r = vector(0, 0, 0)
    minimise(lambda: expected_loss(REWARD_LOSSES["logistic"], r, p, pi), r)
    return without_mean(r.detach())


def reward_gradient(loss, r, p, pi, penalty=0.0):
    """With respect to r, of the expected loss + penalty * (r+^2 + r-^2)."""
    r = r.clone().requires_grad_()
    value = expected_loss(REWARD_LOSSES[loss], r, p, pi) + penalty * ((p + pi) * r**2).sum()
    return torch.autograd.grad(value, r)[0]


@pytest.mark.parametrize("kl", [0.25, 0.5, 1, 2])
def test_one_round_of_rft_is_one_round_of_spin(kl):
    """Fit the reward, then the policy: pi_ref (p/pi_ref)^(1/kl) / Z. So kl is what scale is to SPIN and GSIL,
    and IRFT in one chunk is SPIN: the same loss to the last digit."""
    close(fitted_reward(P, PI), without_mean((P / PI).log()))
    close(best_policy(fitted_reward(P, PI), kl), closed_form(P, PI, kl)[0])
    real, generated = random_logits(50).T[:2]
    for loss in (irft.LOSSES["spin"], REWARD_LOSSES["logistic"]):
        assert torch.equal(loss(real, generated), LOSSES["spin"](real, generated))


def test_the_linear_reward_loss_has_no_minimum_without_a_penalty():
    """The gradient of -(r+ - r-) is pi - p at every r, the paper's own: it never gets flat. A penalty on r^2
    is a bound in disguise: the minimum is at (p - pi) / (p + pi) / (2 penalty)."""
    for size in (0, 1, 1e3):
        close(reward_gradient("linear", size * (P - PI), P, PI), PI - P, 1e-9)
    best = (P - PI) / (P + PI) / (2 * 0.3)
    close(reward_gradient("linear", best, P, PI, penalty=0.3), 0, 1e-12)  # the loss is convex


# ---- 6. RFT, many rounds -----------------------------------------------------------------------------------
#
# Each round samples from the policy of the moment, gives the reward its turn, then fits the policy. The KL is
# to the policy before all training, in every round; in SPIN and IRFT the reference moves along.


def continued(loss, p, kl, step, rounds, bound=float("inf")):
    """The last policy of a double loop whose reward goes on from round to round, one step in each."""
    r = vector(0, 0, 0)
    for _ in range(rounds):
        r = (r - step * reward_gradient(loss, r, p, best_policy(r, kl))).clamp(-bound, bound)
    return best_policy(r, kl)


def sft(p, learning_rate, steps):
    logits = PI.log()
    for _ in range(steps):
        logits = logits - learning_rate * sft_gradient(logits, p)
    return logits.softmax(-1)


def test_small_linear_steps_are_sft():
    """r moves by step * (p - pi), so log pi by step/kl times that: gradient ascent on the likelihood of the
    demonstrations. RFT that ends where SFT ends has not failed, it has converged. (It must move slowly:
    step/kl below 4 is safe for any p; far beyond, the policy swings around p for ever.)"""
    for rounds in (1, 2, 10, 100):
        close(continued("linear", P, 0.5, step=1.5, rounds=rounds), sft(P, 1.5 / 0.5, rounds), 1e-9)
    close(sft(P, 3, 100), P)
    swing = [continued("linear", P, 0.5, step=3, rounds=rounds)[0] for rounds in (100, 101, 102)]
    close(swing, [0.326, 0.874, 0.326], 5e-4)


@pytest.mark.parametrize(
    "kl, first_outcome",
    [
        (0.5, [0.849, 0.002, 0.998]),  # swings ever wider
        (1, [0.6, 0.2, 0.6, 0.2]),  # p, the start, p, the start
        (2, [0.398, 0.293, 0.345, 0.319]),  # settles, far from the demonstrators' .6
    ],
)
def test_a_reward_refitted_to_the_last_round_flips(kl, first_outcome):
    """A round multiplies the error by -1/kl: the distance from a policy between start and p, not from p. For
    the reward judges the last policy, but the next one starts from pi_ref again. Two ways out: y- from all
    policies so far, each as often, or a reward that takes small steps. Both settle at that policy between."""
    between = closed_form(P, PI, 1 + kl)[0]  # here the fitted reward, log p/pi, asks for the pi it judges
    policy, found = PI, []
    for _ in first_outcome:
        before, policy = policy, best_policy(fitted_reward(P, policy), kl)
        error_before, error = [without_mean((x / between).log()) for x in (before, policy)]
        close(error, -error_before / kl, 1e-4)
        found.append(policy[0].item())
    close(found, first_outcome, 5e-4)
    policies = [PI]
    for _ in range(40):
        policies.append(best_policy(fitted_reward(P, torch.stack(policies).mean(0)), kl))
    close(policies[-1], between, 5e-4)
    close(continued("logistic", P, kl, step=0.3, rounds=400), between, 1e-4)


def test_only_a_bounded_reward_keeps_what_is_not_shown():
    """pi_ref does the third thing half of the time. SFT, so a free reward, forgets it. With |r| <= 1, by hand
    for linear: r ends at (1, something, -1), and "something" makes the second as frequent as shown."""
    shown = vector(0.7, 0.3, 0)
    assert sft(shown, 1, 200)[2] < 0.01
    first, _, third = PI * torch.exp(vector(1, 0, -1))
    found = continued("linear", shown, kl=1, step=0.5, rounds=200, bound=1)
    close(found, [0.7 * first / (first + third), 0.3, 0.7 * third / (first + third)])  # the third: .177
