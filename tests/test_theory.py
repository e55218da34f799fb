"""The theory behind gsil.py: a chapter to be read in order. Every claim is a test of the shipped LOSSES.

The setting is the smallest one in which there is something to say: one prompt, and three possible responses,
here called outcomes. No network, no tokens; a policy is three probabilities.

    p                       how often the demonstrators give each outcome: real responses y+ ~ p
    pi                      the same for the policy when the round starts: generated responses y- ~ pi;
                            also the reference, which stands still during the round
    pi'                     the policy being trained, a softmax over its own logits; at step 0 it is pi
    d = log(pi'/pi)         the log-ratio, one number for each outcome
    h = scale * d + shift   what the losses see: the answer to "real or generated?", positive for real

All pairs of three outcomes are only nine, so each expectation below is written out: nothing is sampled, no
answer depends on luck. Two kinds of loss occur. The one-sided ones, a(h+) + b(h-), judge every response by
itself: logistic, hinge, brier, kliep, lsif. spin is pairwise: it sees the difference h+ - h- alone.

    1. what a loss knows      which h each of them makes of p and pi
    2. one round              which policy that is: what scale and shift do
    3. many rounds            where they end, and that this is where SFT ends
    4. large h                what keeps the exponentials finite
"""

import itertools
import math

import pytest
import torch
from make_toy import HASTY

from gsil import H_MAX, LOSSES

RATIO = ["logistic", "brier", "kliep", "lsif"]  # the one-sided losses that find the ratio p/pi itself
SMOOTH = [*RATIO, "spin"]  # hinge has kinks, where LBFGS gets stuck


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


P, PI = vector(0.6, 0.3, 0.1), vector(0.2, 0.3, 0.5)  # the example of the whole chapter


def close(found, expected, tolerance=1e-6):
    """Same numbers: up to 1e-6 for what an optimizer found, 5e-4 for what is written here in 3 digits."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected, atol=tolerance, rtol=0)


def expected_loss(loss, h_real, h_generated, p, pi):
    """E loss(h(y+), h(y-)) over y+ ~ p, y- ~ pi. Arguments (outcomes,), or (prompts, outcomes): the sum."""
    real, generated = torch.broadcast_tensors(h_real[..., :, None], h_generated[..., None, :])
    probability = p[..., :, None] * pi[..., None, :]  # of each pair: (..., outcomes, outcomes)
    return (probability.flatten() * LOSSES[loss](real.flatten(), generated.flatten())).sum()


def minimise(objective, *parameters):
    """Change the parameters in place until objective() is as small as it gets. For smooth objectives."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


def one_round(loss, p, pi, scale, shift=0.0, learned=()):
    """The policy after a round trained to its optimum. learned: what is trained with it, such as a shift."""
    logits = pi.log().clone()  # at step 0 the policy is the reference

    def objective():
        h = scale * (logits.log_softmax(-1) - pi.log()) + shift
        return expected_loss(loss, h, h, p, pi)

    minimise(objective, logits, *learned)
    return logits.detach().softmax(-1)


def closed_form(p, pi, scale):
    """pi (p/pi)^(1/scale) / Z, the hero of this chapter, and scale * log Z."""
    unnormalised = pi * (p / pi) ** (1 / scale)
    z = unnormalised.sum(-1, keepdim=True)
    return unnormalised / z, scale * z.log()


def random_logits(count):
    """(count, 3), the same ones every time."""
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def all_pairs(h):
    """Every h beside every h, (n,) -> two (n * n,), ready to collect gradients."""
    real, generated = torch.cartesian_prod(h, h).unbind(1)
    return real.clone().requires_grad_(), generated.clone().requires_grad_()


# ---- 1. What a loss knows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, at_0, at_2",
    [
        ("logistic", 2 * math.log(2), 2 * math.log1p(math.exp(-2)) + 2),  # 1.3863, 2.254
        ("hinge", 2, 3),
        ("brier", 0.5, (1 + math.exp(4)) / (1 + math.exp(2)) ** 2),  # 0.790
        ("kliep", 1, math.exp(2) - 2),  # 5.389
        ("lsif", -0.5, math.exp(4) / 2 - math.exp(2)),  # 19.91
        ("spin", math.log(2), math.log(2)),  # a shift cancels in h+ - h-
    ],
)
def test_losses_before_the_first_step(loss, at_0, at_2):
    """Policy == reference: d = 0, h = shift, and every loss has a value that can be worked out by hand.

    They are the numbers to compare the first line of a training log with. And a loss keeps its batch, (B,):
    if it averaged by itself, the parts of a batch could not be added up to the gradient of the whole.
    """
    for shift, value in [(0, at_0), (2, at_2)]:
        for batch in (1, 5):
            h = torch.full((batch,), float(shift), dtype=torch.float64)
            close(LOSSES[loss](h, h), [value] * batch, 1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_push_real_up_and_generated_down(loss):
    """Near h = 0 every loss falls as h(y+) rises and as h(y-) sinks, whatever the other one is.

    The least a loss must do to imitate: with one sign wrong, training would unlearn the demonstrations.
    """
    real, generated = all_pairs(torch.linspace(-0.9, 0.9, 7))  # hinge is flat from 1 on: part 3
    LOSSES[loss](real, generated).sum().backward()
    assert (real.grad < 0).all() and (generated.grad > 0).all()


@pytest.mark.parametrize("loss", RATIO)
def test_the_best_h_is_the_log_ratio(loss):
    """Let h be any three numbers: the best ones are log p/pi. A classifier that is right knows the ratio.

    This is why one can learn to write by learning to judge: where h is large, real responses are more likely
    than the policy makes them, and by how much is known. Every claim of parts 2 and 3 rests on it.
    """
    h = vector(0, 0, 0)
    minimise(lambda: expected_loss(loss, h, h, P, PI), h)
    close(h, (P / PI).log())  # (1.099, 0, -1.609)


def test_spin_finds_the_log_ratio_up_to_a_constant():
    """A loss of h+ - h- cannot know a number that is added to both. The differences it gets right."""
    h = vector(0, 0, 0)
    minimise(lambda: expected_loss("spin", h, h, P, PI), h)
    unknown = h - (P / PI).log()
    close(unknown, unknown.mean().expand(3))
    moved = h.detach() + 7
    close(expected_loss("spin", moved, moved, P, PI), expected_loss("spin", h, h, P, PI), 1e-12)


@pytest.mark.parametrize("demonstrators", [(0.6, 0.35, 0.05), (0.25, 0.35, 0.4)])
def test_hinge_finds_the_sign_only(demonstrators):
    """Two groups of demonstrators, one far from pi and one near it, and hinge says (1, 1, -1) to both.

    It knows which of p and pi is larger, not by how much, so a round trained to its end goes as far for a
    small difference as for a large one. (A piecewise linear function has its minimum at a kink: instead of
    an optimizer, a grid that contains the kinks.)
    """
    p, grid = vector(*demonstrators), [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    best = min(
        itertools.product(grid, repeat=3),
        key=lambda h: expected_loss("hinge", vector(*h), vector(*h), p, PI).item(),
    )
    assert best == (1, 1, -1)


def bregman(phi, h_real, h_generated):
    """-phi'(r+) + r- phi'(r-) - phi(r-) for each pair, with r = exp(h); the slope phi' by autograd."""
    real, generated = h_real.exp().requires_grad_(), h_generated.exp().requires_grad_()
    (slope_real,) = torch.autograd.grad(phi(real).sum(), real)
    (slope_generated,) = torch.autograd.grad(phi(generated).sum(), generated)
    return (-slope_real + generated * slope_generated - phi(generated)).detach()


@pytest.mark.parametrize(
    "loss, phi, constant",
    [
        ("logistic", lambda r: r * r.log() - (1 + r) * (1 + r).log(), 0),
        ("brier", lambda r: 1 / (1 + r), 1),
        ("kliep", lambda r: r * r.log() - r, 0),
        ("lsif", lambda r: (r - 1) ** 2 / 2, -0.5),
    ],
)
def test_four_losses_are_one_family(loss, phi, constant):
    """Each of the four is E_p[-phi'(r)] + E_pi[r phi'(r) - phi(r)] with a convex phi of its own, r = exp(h).

    r is a guess of p/pi. What the formula measures, up to a number that does not depend on r, is how far
    the tangent of phi at r is below phi at p/pi (a Bregman divergence). No guess is better than r = p/pi:
    that they share an optimum is no coincidence. The equality holds pair by pair, with the factor 1 and the
    constants given above, which no gradient sees. A forgotten 1/2 on one side would leave all signs right
    and move the optimum.
    """
    h = torch.linspace(-4, 4, 33, dtype=torch.float64)  # inside H_MAX: part 4
    real, generated = torch.cartesian_prod(h, h).unbind(1)
    close(LOSSES[loss](real, generated) - bregman(phi, real, generated), real * 0 + constant, 1e-9)


def test_a_new_phi_is_a_new_loss(monkeypatch):
    """Choose a convex phi, work out -phi'(r) for r = exp(h+) and r phi'(r) - phi(r) for r = exp(h-): done.

    phi = -2 sqrt(r) gives exp(-h+/2) + exp(h-/2), the exponential loss of AdaBoost. One line in LOSSES, and
    it finds the ratio as the others do. (For long responses its exponentials need what part 4 shows.)
    """

    def boosting(h_real, h_generated):
        return torch.exp(-h_real / 2) + torch.exp(h_generated / 2)

    monkeypatch.setitem(LOSSES, "boosting", boosting)
    real, generated = random_logits(20).T[:2]
    close(boosting(real, generated), bregman(lambda r: -2 * r.sqrt(), real, generated), 1e-12)
    h = vector(0, 0, 0)
    minimise(lambda: expected_loss("boosting", h, h, P, PI), h)
    close(h, (P / PI).log())


# ---- 2. One round: what scale and shift do -----------------------------------------------------------------
#
# From now on h is not free: it is scale * log(pi'/pi) + shift, and pi' has to sum to one. If h is to be
# log p/pi, then pi' is pi (p/pi)^(1/scale) exp(-shift/scale): a sum of one needs shift = scale * log Z.


def test_the_closed_form_by_hand():
    """Scale 1/2 squares p/pi: (.2, .3, .5) * (9, 1, 1/25) = (1.8, .3, .02), and Z = 2.12.

    The demonstrators give the first outcome 60 %, the new policy 85 %: it goes past them, away from its own
    habits. Scale 1 would land on p, scale 2 on the way there.
    """
    policy, shift = closed_form(P, PI, 0.5)
    close(policy, [0.849, 0.142, 0.009], 5e-4)
    close(shift, [0.376], 5e-4)
    first = [closed_form(P, PI, scale)[0][0].item() for scale in (2, 1, 0.5)]
    assert PI[0] < first[0] < first[1] < first[2] and math.isclose(first[1], P[0])


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2])
def test_a_round_of_spin_is_the_closed_form(scale):
    """SPIN needs no shift: it fixes h up to a constant, and that pi' sums to one fixes the constant."""
    close(one_round("spin", P, PI, scale), closed_form(P, PI, scale)[0])


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("loss", RATIO)
def test_with_the_right_shift_all_four_reach_the_closed_form(loss, scale):
    """The one-sided losses fix h itself, so they get there if h can be log p/pi: if shift = scale * log Z.

    Z belongs to the prompt, and so does the right shift. But at scale 1, Z = sum of p = 1: there it is 0
    for every prompt, and a round is plain imitation.
    """
    policy, shift = closed_form(P, PI, scale)
    close(one_round(loss, P, PI, scale, shift), policy)
    if scale == 1:
        close(shift, [0.0])
        close(one_round(loss, P, PI, scale, shift=0.0), P)


def test_without_the_shift_a_round_is_more_timid():
    """At scale 1/2 and shift 0 log p/pi is out of reach: most losses settle between p and the closed form.

    lsif is the exception, by a coincidence worth understanding: E_pi[exp(2h)] is E_pi[pi'/pi] = 1 at scale
    1/2, whatever the policy. What remains, E_p[-sqrt(pi'/pi)], has the closed form as its minimum. (kliep
    has the same luck at scale 1, where it is SFT: part 3.) Between 1/2 and 1, lsif even goes further than
    SPIN.
    """
    close(one_round("logistic", P, PI, 0.5), [0.755, 0.225, 0.019], 5e-4)  # closed form: (.849, .142, .009)
    exact = closed_form(P, PI, 0.5)[0]
    for loss in ("logistic", "brier", "kliep"):
        assert P[0] + 0.1 < one_round(loss, P, PI, 0.5)[0] < exact[0] - 0.05
    close(one_round("lsif", P, PI, 0.5), exact)
    assert one_round("lsif", P, PI, 0.7)[0] > one_round("spin", P, PI, 0.7)[0] + 0.03


def learnable_shift():
    return torch.zeros((), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("loss", RATIO)
def test_a_learned_shift_finds_the_right_one(loss):
    """Nobody knows Z. But a shift that is trained with the policy, `--shift learn`, ends at scale * log Z.

    With any other shift h cannot be log p/pi, and the expected loss is larger: the loss itself finds Z.
    """
    shift = learnable_shift()
    policy, right = closed_form(P, PI, 0.5)
    close(one_round(loss, P, PI, 0.5, shift, learned=[shift]), policy)
    close(shift.detach(), right[0])


@pytest.mark.parametrize("loss", RATIO)
def test_one_shift_for_all_prompts_is_a_compromise(loss):
    """Two prompts, scale 1/4: the right shifts are .70 and .08, and the learned one lies between them.

    So the prompt that asks for a large change gets too little of it (first outcome .93 to .95 instead of
    .982) and the other one too much (.86 to .89 instead of .690). A shift per prompt is exact; a single
    number is a compromise, one reason why a measured table need not agree with the closed form.
    """
    p = torch.stack([P, vector(0.4, 0.3, 0.3)])  # (2 prompts, 3 outcomes)
    pi = torch.stack([PI, vector(0.3, 0.3, 0.4)])
    exact, right = closed_form(p, pi, 0.25)  # (2, 3), (2, 1)
    close(exact[:, 0], [0.982, 0.690], 5e-4)
    close(one_round(loss, p, pi, 0.25, right), exact)
    shift = learnable_shift()
    learned = one_round(loss, p, pi, 0.25, shift, learned=[shift])
    assert right[1] + 0.1 < shift < right[0] - 0.1
    assert learned[0, 0] < exact[0, 0] - 0.02 and learned[1, 0] > exact[1, 0] + 0.1


def test_spin_cannot_learn_a_shift():
    """The shift cancels in h+ - h-, so it has no gradient: with `--loss spin` there is none to learn."""
    shift = learnable_shift()
    h = 0.5 * random_logits(1)[0] + shift
    expected_loss("spin", h, h, P, PI).backward()
    assert abs(shift.grad.item()) < 1e-12
    expected_loss("logistic", h, h, P, PI).backward()  # any other loss does move it
    assert abs(shift.grad.item()) > 1e-3


@pytest.mark.parametrize("loss", ["spin", "logistic"])
@pytest.mark.parametrize("scale, predicted", [(1, 0.65), (0.5, 0.89), (0.3, 0.99)])
def test_what_the_closed_form_says_about_the_toy(loss, scale, predicted):
    """tests/toy in one line: an answer is worked or hasty, two outcomes, and problems have 2, 3 or 4 steps.

    For two outcomes the closed form is a straight line in the logit of the worked share: new = base +
    (demonstrators - base) / scale. So the habits of base and demonstrators alone, HASTY, predict how many
    answers will show their working after one round, with spin or with the right shifts. README puts what
    was measured beside it.
    """

    def worked_or_hasty(writer):  # (3, 2): after 2, 3, 4 steps; worked, hasty
        hasty = vector(*HASTY[writer].values())
        return torch.stack([1 - hasty, hasty], -1)

    pi, p = worked_or_hasty("base"), worked_or_hasty("demo")
    worked = one_round(loss, p, pi, scale, shift=closed_form(p, pi, scale)[1])[:, 0]
    base, demonstrators = pi[:, 0].logit(), p[:, 0].logit()
    close(worked, (base + (demonstrators - base) / scale).sigmoid())
    close(worked.mean(), predicted, 0.01)


# ---- 3. Many rounds: where they end ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.4, 0.5, 0.7, 1, 2])
def test_a_round_multiplies_the_error_by_one_minus_one_over_scale(scale):
    """The logarithm of the closed form is log(pi'/p) = (1 - 1/scale) log(pi/p) + constant. Here: five rounds.

    -1.5 at scale .4: each round ends on the other side of p, further away. -1 at 1/2, -.43 at .7, 0 at 1,
    and 1/2 at 2, which creeps up from one side. So rounds converge for scale > 1/2; below, more rounds do
    harm.
    """

    def error(policy):
        log_ratio = (policy / P).log()
        return log_ratio - log_ratio.mean()  # up to a constant: without its mean

    policy = vector(0.4, 0.3, 0.3)
    for _ in range(5):
        before, policy = error(policy), one_round("spin", P, policy, scale)
        close(error(policy), (1 - 1 / scale) * before, 1e-5)


def test_the_three_fates_of_iterated_spin():
    """The same in pictures: scale 1 arrives after one round, 1/2 is back after two, .4 swings ever wider."""
    close(one_round("spin", P, PI, 1), P)
    there = one_round("spin", P, PI, 0.5)
    close(one_round("spin", P, there, 0.5), PI)
    policy, first_outcome = PI, []
    for _ in range(3):
        policy = one_round("spin", P, policy, 0.4)
        first_outcome.append(policy[0].item())
    close(first_outcome, [0.910, 0.012, 0.988], 5e-4)  # the demonstrators': .6


@pytest.mark.parametrize("scale", [0.4, 0.7, 2])
@pytest.mark.parametrize("loss", RATIO)
def test_without_the_shift_the_limit_is_the_same(loss, scale):
    """Close to p, log Z is as small as the error squared: there a missing shift does not matter to anybody.

    So the one-sided losses at shift 0, timid as they are far from p, obey the same factor at last: below
    scale 1/2 they too leave p, and end in a swing around it. No choice of loss makes many rounds safe.
    """
    near = (P.log() + vector(0.001, 0, -0.001)).softmax(-1)
    before, after = [(policy / P).log() for policy in (near, one_round(loss, P, near, scale))]
    close(after, (1 - 1 / scale) * before, 2e-5)


def sft_gradient(logits, p):
    """Of SFT's expected loss, -E_p[log pi], with respect to the policy's logits."""
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(-(p * logits.log_softmax(-1)).sum(), logits)[0]


def first_gradient(loss, logits, p, scale=1.0, shift=0.0, negatives=None, generated_only=False):
    """Of the expected loss at step 0: there d is 0, its gradient is not. Negatives: pi, unless given."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    h = scale * (logp - logp.detach()) + shift
    pi = logp.detach().exp() if negatives is None else negatives
    value = expected_loss(loss, h.detach() if generated_only else h, h, p, pi)
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_on_average_generated_responses_do_not_push_at_first(loss):
    """E_pi[grad log pi] = grad sum(pi) = grad 1 = 0: what a policy's own samples say about it cancels out.

    So at step 0 the generated half of every loss has no gradient in expectation, at any shift, although
    each response has one: noise at first, and a brake as soon as d is not 0. It needs negatives that really
    are samples of pi: with greedy ones (always the likeliest outcome, as in the official code) it is false.
    """
    for logits in random_logits(5):
        pushes = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), logits)  # (outcome, logit)
        assert (pushes.abs().amax(-1) > 1e-2).all()  # each response pushes,
        close(logits.softmax(-1) @ pushes, vector(0, 0, 0), 1e-12)  # their mean does not
        greedy = torch.nn.functional.one_hot(logits.argmax(), 3).double()
        for shift in (-0.5, 0, 0.5, 2):
            close(first_gradient(loss, logits, P, 1, shift, generated_only=True), vector(0, 0, 0), 1e-12)
            assert first_gradient(loss, logits, P, 1, shift, greedy, generated_only=True).norm() > 1e-2


@pytest.mark.parametrize(
    "loss, factor",
    [("logistic", 1 / 2), ("hinge", 1), ("brier", 1 / 4), ("kliep", 1), ("lsif", 1), ("spin", 1 / 2)],
)
def test_the_first_step_of_a_round_is_a_step_of_sft(loss, factor):
    """At shift 0 what is left of the gradient is SFT's, times scale, times the slope of the loss at h = 0.

    Two lessons: a round departs from SFT only by what happens after its first step; and learning rates of
    different losses and scales are not comparable, because the first steps differ by these factors.
    """
    for logits in random_logits(5):
        close(first_gradient(loss, logits, P, scale=0.3), 0.3 * factor * sft_gradient(logits, P), 1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_policy_that_writes_like_the_demonstrators_stays(loss):
    """pi = p: nothing tells real from generated, so there is no gradient. Elsewhere there is one."""
    for shift in (-0.9, 0, 0.9):  # inside hinge's margin; beyond it: see below
        close(first_gradient(loss, P.log(), P, 0.5, shift), vector(0, 0, 0), 1e-12)
        assert first_gradient(loss, PI.log(), P, 0.5, shift).norm() > 1e-2


FEATURE = vector(0, 1, 2)  # a policy with one parameter, softmax(slope * FEATURE), can only tilt,
DENTED = vector(0.6, 0.1, 0.3)  # and these demonstrators have a dent in the middle: it cannot become them


def sft_slope():
    """(1,): the best that SFT can do under these circumstances, about -.466."""
    slope = vector(0)
    minimise(lambda: -(DENTED * (slope * FEATURE).log_softmax(-1)).sum(), slope)
    return slope.detach()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_policy_that_cannot_write_like_them_stays_where_sft_stays(loss):
    """Real policies cannot reach p, and which point next to it a method ends at might depend on the loss.

    It does not: the gradient at the start of a round is SFT's in any class of policies, so a round moves
    away from every point but SFT's. No loss here changes WHERE endless rounds end, only how they get there,
    and what a single round does.
    """
    slope = sft_slope()
    assert ((slope * FEATURE).softmax(-1) - DENTED).abs().max() > 0.1
    for step in (-0.5, 0.0, 0.5):  # beside SFT's point, at it, beside it
        by_logit = first_gradient(loss, (slope + step) * FEATURE, DENTED)
        by_slope = FEATURE @ by_logit  # chain rule: logits = slope * FEATURE
        if step:
            assert by_slope * step > 1e-2  # descent leads back
        else:
            close(by_slope, 0.0)


@pytest.mark.parametrize("loss", SMOOTH)
def test_endless_rounds_end_where_sft_ends(loss):
    """The same, walked: 25 rounds at scale 1, shift 0, each to its optimum. The first one ends elsewhere.

    All but kliep's, which at scale 1 is SFT. (hinge is left out: it only knows signs, so rounds trained to
    their end jump to and fro around the point where they would have stayed.)
    """

    def round_from(start):
        slope, reference = start.clone(), (start * FEATURE).log_softmax(-1)

        def objective():
            h = (slope * FEATURE).log_softmax(-1) - reference
            return expected_loss(loss, h, h, DENTED, reference.exp())

        minimise(objective, slope)
        return slope.detach()

    slopes = [vector(0.8)]
    for _ in range(25):
        slopes.append(round_from(slopes[-1]))
    close(slopes[-1], sft_slope(), 1e-5)
    assert (abs(slopes[1] - sft_slope()) < 1e-5) == (loss == "kliep")


def test_kliep_at_scale_1_is_sft():
    """E_p[-d] + E_pi[exp d], and E_pi[pi'/pi] = sum(pi') = 1 for any policy: SFT's loss plus a constant.

    Samples buy nothing here in expectation, only noise. If an experiment shows kliep at scale 1, shift 0 to
    beat SFT, look for the reason in the optimizer, not in the loss.
    """
    for logits in random_logits(100):
        policy = logits.softmax(-1)
        d = (policy / PI).log()
        assert d.max() < H_MAX
        sft, constant = -(P * policy.log()).sum(), (P * PI.log()).sum() + 1
        close(expected_loss("kliep", d, d, P, PI), sft + constant, 1e-12)


def test_hinge_with_a_shift_of_1_or_more_starts_blind():
    """max(0, 1 - h+) is flat once h+ >= 1: at shift 1 or 2 (official: 2) no real response has a gradient.

    Generated ones have, but theirs cancel, so hinge stands on a hilltop: the slope is zero though pi is far
    from p, any small step lowers the loss, and sampling noise picks the direction. (It learns from real
    responses again once it has moved far enough that some h+ < 1.) The other losses still see p at shift 2.
    """
    for shift in (1.0, 2.0):
        real, generated = (torch.full((4,), shift, requires_grad=True) for _ in range(2))
        LOSSES["hinge"](real, generated).sum().backward()
        assert (real.grad == 0).all() and (generated.grad == 1).all()
        close(first_gradient("hinge", PI.log(), P, 1, shift), vector(0, 0, 0), 1e-12)
    hilltop = expected_loss("hinge", vector(2, 2, 2), vector(2, 2, 2), P, PI)
    for direction in random_logits(20):
        h = (PI.log() + 0.1 * direction).log_softmax(-1) - PI.log() + 2
        assert expected_loss("hinge", h, h, P, PI) < hilltop
    for loss in SMOOTH:
        assert first_gradient(loss, PI.log(), P, 1, shift=2.0).norm() > 1e-2


# ---- 4. Large h: what keeps the exponentials finite --------------------------------------------------------
#
# The log-ratio of a long response is a sum over its tokens: hundreds are no accident. exp(90) is infinite in
# float32, and on finite data nothing stops -exp(h+), the real side of lsif, from falling for ever.


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_and_no_gradient_overflows(loss):
    """In float32 and for every pair of h up to 1000 in size: a single inf or nan would end a run of days."""
    h = torch.tensor([-1e3, -100.0, -45.0, -H_MAX, 0.0, H_MAX, 45.0, 100.0, 1e3])
    real, generated = all_pairs(h)
    losses = LOSSES[loss](real, generated)
    losses.sum().backward()
    assert losses.isfinite().all() and real.grad.isfinite().all() and generated.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss, textbook",
    [
        ("kliep", lambda h_real, h_generated: -h_real + torch.exp(h_generated)),
        ("lsif", lambda h_real, h_generated: -torch.exp(h_real) + 0.5 * torch.exp(2 * h_generated)),
    ],
)
def test_up_to_h_max_losses_are_the_textbook_ones(loss, textbook):
    """What keeps them finite must not touch |h| <= H_MAX, in value or gradient, to the last digit.

    Else all that parts 1 to 3 say would hold for some other loss. H_MAX itself is included.
    """
    h = torch.linspace(-H_MAX, H_MAX, 41)
    answers = []
    for function in (LOSSES[loss], textbook):
        real, generated = all_pairs(h)
        losses = function(real, generated)
        losses.sum().backward()
        answers.append((losses.detach(), real.grad, generated.grad))
    for shipped, plain in zip(*answers):
        assert torch.equal(shipped, plain)


@pytest.mark.parametrize("loss, push", [("kliep", math.exp(H_MAX)), ("lsif", math.exp(2 * H_MAX))])
def test_beyond_h_max_generated_responses_are_still_pushed_down(loss, push):
    """The exponential goes on as its tangent: its slope stays what it is at H_MAX, it cannot explode or fade.

    A plain clamp would give up on the very response that the policy overrates most.
    """
    generated = vector(H_MAX, H_MAX + 1, 50, 1000).requires_grad_()
    LOSSES[loss](vector(0, 0, 0, 0), generated).sum().backward()
    close(generated.grad / push, [1.0] * 4, 1e-9)


def test_beyond_h_max_lsif_stops_rewarding_real_responses():
    """-exp(h+) has no minimum, so a clamp and no tangent: a real response e^5 times likelier is learned."""
    real = vector(H_MAX - 1, H_MAX + 1, 50, 1000).requires_grad_()
    losses = LOSSES["lsif"](real, vector(0, 0, 0, 0))
    losses.sum().backward()
    assert real.grad[0] < 0 and (real.grad[1:] == 0).all()
    close(losses[1:].detach(), [0.5 - math.exp(H_MAX)] * 3, 1e-9)
