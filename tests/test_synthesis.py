"""Priors, the image optimiser and the rules of the game, on models of a few numbers."""
import copy
import random
import sys
from contextlib import nullcontext

import pytest
import torch

from psaq_mm.errors import UserError
from psaq_mm.synthesis import (
    Game,
    GameConfig,
    ImageOptimizer,
    PatchSimilarityTap,
    SynthesisConfig,
    attention_tokens,
    augment,
    discrepancy,
    distillation,
    head_dissimilarity,
    learning_rate,
    lesson_view,
    prior_loss,
    total_variation,
    valid_range,
)

LOW, HIGH = valid_range([120.0, 110.0, 100.0], [60.0, 55.0, 50.0])


def test_valid_range_is_black_and_white():
    pixels = torch.tensor([0.0, 255.0])
    for low, high, mean, std in zip(LOW.flatten(), HIGH.flatten(), (120, 110, 100), (60, 55, 50)):
        assert torch.allclose((pixels - mean) / std, torch.stack([low, high]))


def test_total_variation_of_known_images():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)  # neighbours differ by 1 across, 0 down, 1 along both diagonals
    assert total_variation(ramp).item() == pytest.approx(0.75, abs=1e-5)
    assert total_variation(torch.ones(2, 3, 9, 7)).max() < 1e-5
    doubled = torch.cat([ramp, 2 * ramp])
    assert torch.allclose(total_variation(doubled), torch.tensor([0.75, 1.5]), atol=1e-5)  # images are independent


def test_gradient_of_total_variation_is_autograds():
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    differences = (images[..., :, :-1] - images[..., :, 1:], images[..., :-1, :] - images[..., 1:, :],
                   images[..., 1:, :-1] - images[..., :-1, 1:], images[..., :-1, :-1] - images[..., 1:, 1:])
    plain = torch.stack([d.flatten(1).square().mean(1).sqrt() for d in differences]).mean(0)
    torch.testing.assert_close(total_variation(images), plain)
    weights = torch.tensor([1.0, -3.0], dtype=torch.float64)
    expected, = torch.autograd.grad((plain * weights).sum(), images)
    found, = torch.autograd.grad((total_variation(images) * weights).sum(), images)
    torch.testing.assert_close(found, expected)


def test_prior_pulls_from_both_sides():
    config = SynthesisConfig(tv_target=0.75, tv_weight=2.0)
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert prior_loss(ramp, config).item() == pytest.approx(0, abs=1e-4)
    assert prior_loss(2 * ramp, config).item() == pytest.approx(1.5, abs=1e-4)
    assert prior_loss(0 * ramp, config).item() == pytest.approx(1.5, abs=1e-4)


def test_augmentation_only_moves_pixels_and_follows_the_seed():
    images = torch.randn(2, 3, 20, 30)
    config = SynthesisConfig(jitter=7)
    views = [augment(images, config, random.Random(seed)) for seed in range(6)]
    for view in views:
        assert torch.equal(view.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(views[3], augment(images, config, random.Random(3)))
    assert len({v[0, 0, 0, 0].item() for v in views}) > 3


def lesson(images, seed=0, **options):
    return lesson_view(images, list(images), SynthesisConfig(jitter=0, flip=False), GameConfig(**options), LOW, HIGH,
                       random.Random(seed))


def test_lesson_views_follow_the_seed_and_leave_the_images_alone():
    images = torch.rand(3, 3, 20, 32)
    before = images.clone()
    views = [lesson(images, seed) for seed in range(4)]
    assert torch.equal(images, before)
    assert torch.equal(views[2], lesson(images, 2)) and not torch.equal(views[2], views[3])
    assert all(view.shape == images.shape and (view >= LOW).all() and (view <= HIGH).all() for view in views)
    assert torch.equal(lesson(images, crop=1, color=0, mix=False), images)


def test_each_variation_of_lesson_views_does_what_it_says():
    images = torch.stack([torch.full((3, 40, 40), value) for value in (0.2, 0.7)])
    mixed = lesson(images, 1, crop=1, color=0)
    assert (set(mixed.unique().tolist()) == set(images.unique().tolist())
            and not torch.equal(mixed, images))  # a rectangle of the other, at some seed
    ramp = torch.linspace(0, 1, 40).expand(1, 3, 40, 40)
    for seed in range(9):
        crop = lesson(ramp, seed, crop=0.25, color=0, mix=False)[0, 0, 20]
        slope = (crop[30] - crop[10]) / (ramp[0, 0, 20, 30] - ramp[0, 0, 20, 10])
        assert 0.45 <= slope <= 1.0  # a side of at least half the image
    colored = lesson(ramp, 3, crop=1, color=0.5, mix=False)[0]
    span = colored.amax((1, 2)) - colored.amin((1, 2))
    assert (0.4 <= span).all() and (span <= 1.8).all() and len(span.unique()) == 3


def test_distillation_is_a_relative_squared_error_with_autograds_gradient(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sys.modules['psaq_mm.synthesis.game'], 'CHUNK', 10)
    teacher = [torch.randn(2, 3, 4, 4), 10 * torch.randn(2, 5), torch.randn(3, 7).half()]
    student = [torch.randn(t.shape).requires_grad_() for t in teacher]
    student[0] = student[0].transpose(2, 3)
    for t, s in zip(teacher, student):
        plain = (s - t).square().sum() / t.float().square().sum()
        error, gap = distillation(t, s)
        torch.testing.assert_close(error, plain)
        torch.testing.assert_close(gap, discrepancy([t], [s], len(t)).mean().detach())
        assert not gap.requires_grad
        for a, b in zip(torch.autograd.grad(3 * error, s), torch.autograd.grad(3 * plain, s)):
            torch.testing.assert_close(a, b)


def test_learning_rate_warms_up_and_falls_to_nearly_zero():
    config = SynthesisConfig(steps=100, lr=0.25, warmup=0.2)
    rates = [learning_rate(step, config) for step in range(100)]
    assert max(rates) == 0.25 and rates.index(0.25) == 19
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 0.001


def test_optimizer_lowers_the_objective_inside_the_valid_range():
    images = torch.randn(2, 3, 8, 8) * 10
    optimizer = ImageOptimizer(images, LOW, HIGH, 0.5)
    values = [optimizer.step(lambda x: -(x**2).mean()) for _ in range(30)]
    assert values[-1] < values[0]
    assert (optimizer.images >= LOW).all() and (optimizer.images <= HIGH).all()


def test_nan_objective_is_an_error_that_says_so():
    optimizer = ImageOptimizer(torch.randn(1, 3, 8, 8), LOW, HIGH, 0.5)
    with pytest.raises(UserError, match='nan.*checkpoint'):
        optimizer.step(lambda x: x.sum() * float('nan'))


def test_discrepancy_is_relative_and_per_image():
    teacher = [torch.ones(2, 3, 4, 4), 10 * torch.ones(2, 5, 2, 2)]
    student = [teacher[0] * torch.tensor([1.0, 1.2]).view(2, 1, 1, 1), teacher[1]]
    assert torch.allclose(discrepancy(teacher, student, 2), torch.tensor([0.0, 0.1]), atol=1e-6)
    layers = [torch.stack([t] * 3) for t in teacher], [torch.stack([s] * 3) for s in student]  # (layers, images, ...)
    assert torch.allclose(discrepancy(*layers, 2), torch.tensor([0.05, 0.05]), atol=1e-6)


class Tokens(torch.nn.Module):
    """A backbone in miniature: patches, one 'attention product', a feature map."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, 4, 4)
        self.product = torch.nn.Identity()

    def forward(self, x, visit=None, visit_heads=None):
        y = self.embed(x)
        return [self.product(y.flatten(2).transpose(1, 2)[:, None])]


def game(**rules):
    teacher = Tokens().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_()
    with torch.no_grad():
        student.embed.weight += 0.02 * torch.randn_like(student.embed.weight)
    adam = torch.optim.Adam(student.parameters(), lr=2e-3)

    def update(loss):
        adam.zero_grad()
        loss.backward()
        adam.step()

    images = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    made = Game(GameConfig(**rules), SynthesisConfig(jitter=2), teacher, student,
                PatchSimilarityTap([teacher.product], [attention_tokens]), dict(student.named_parameters()), update,
                images[:2], images[2:], LOW, HIGH)
    made.start()
    return made, student


def test_turns_follow_the_discrepancy():
    played, _ = game(lower=0.7, upper=1.1, weight=20.0, bound=9.0, student_patience=1000, image_patience=1000)
    turns = []
    for number in range(150):
        before, start, student = played.turn, played.turn_start, played.student_updates
        log = played.step(random.Random(number))
        assert (played.student_updates > student) == (before == 'student')
        if played.turn != before:
            assert played.average < 0.7 * start if before == 'student' else played.average > 1.1 * start
            turns.append(before)
        assert log['discrepancy'] >= 0
    assert len(turns) >= 2 and set(turns) == {'student', 'images'}


def test_patience_ends_a_turn():
    played, _ = game(lower=1e-9, upper=1e9, student_patience=5, image_patience=3)
    turns = []
    for number in range(20):
        turns.append(played.turn)
        played.step(random.Random(number))
    assert turns == (['student'] * 5 + ['images'] * 3) * 2 + ['student'] * 4


def test_an_update_of_the_images_computes_no_gradient_of_the_student():
    played, student = game()
    needed, plain = [], student.forward

    def forward(x):
        needed.append(any(p.requires_grad for p in student.parameters()))
        return plain(x)

    played.turn, played.student = 'images', forward
    before = [batch.clone() for batch in (o.images for o in played.optimizers)]
    played.step(random.Random(0))
    assert needed == [False] and all(p.requires_grad for p in student.parameters())
    assert any(not torch.equal(a, o.images) for a, o in zip(before, played.optimizers))
    played.student = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        played.turn = 'images'
        played.step(random.Random(0))
    assert all(p.requires_grad for p in student.parameters())


def test_images_gain_nothing_beyond_the_bound():
    """Far over the bound the objective's gradient is the entropy's and the priors' alone."""
    gradients = []
    for weight in (0.0, 5.0):
        torch.manual_seed(3)
        played, student = game(bound=1.01, weight=weight)
        with torch.no_grad():
            student.embed.weight += 1.0  # a hopeless student
        played.turn = 'images'
        played.step(random.Random(0))
        gradients.append(played.optimizers[0].images.grad.clone())
    assert torch.equal(*gradients)
    gradients.clear()
    for weight in (0.0, 5.0):
        torch.manual_seed(3)
        played, _ = game(bound=10.0, weight=weight)
        played.turn = 'images'
        played.step(random.Random(0))
        gradients.append(played.optimizers[0].images.grad.clone())
    assert not torch.equal(*gradients)


def test_student_learns_and_the_best_is_kept():
    played, student = game(student_patience=10)
    for number in range(120):
        played.step(random.Random(number))
    with torch.no_grad():
        student.embed.weight += 1.0  # ruined at the last moment
    played.finish()
    assert played.best < 0.8 * played.initial
    assert played.evaluate() == pytest.approx(played.best)


@pytest.mark.parametrize('gain, taken', [(0.1, True), (0.999, False)])
def test_the_student_before_the_game_stays_where_too_little_was_gained(gain, taken):
    played, student = game(student_patience=10, gain=gain)
    start = [p.detach().clone() for p in student.parameters()]
    for number in range(120):
        played.step(random.Random(number))
    played.finish()
    assert played.best < 0.8 * played.initial and played.gained == taken
    assert played.evaluate() == pytest.approx(played.best if taken else played.initial)
    assert all(torch.equal(a, b) for a, b in zip(start, student.parameters())) != taken


def test_student_never_ends_worse_than_its_plain_calibration():
    played, student = game(evaluate_every=1, student_patience=1000, lower=1e-9)
    start = [p.detach().clone() for p in student.parameters()]

    def ruin(loss):
        with torch.no_grad():
            student.embed.weight += 0.5

    played.update = ruin
    for number in range(5):
        played.step(random.Random(number))
    assert played.evaluate() > played.initial
    played.finish()
    assert all(torch.equal(a, b) for a, b in zip(start, student.parameters()))


def test_a_lesson_serves_several_updates_with_one_pass_of_the_teacher():
    played, _ = game(lower=1e-9, upper=1e9, student_patience=7, image_patience=2, view_updates=3)
    forward, passes = played.teacher.forward, []
    played.teacher.forward = lambda images, *visits: passes.append(len(images)) or forward(images)
    views, student = [], played.student
    played.student = lambda view, *visits: views.append(view) or student(view)
    for number in range(7):
        assert played.turn == 'student'
        played.step(random.Random(number))
    assert len(passes) == 3
    for first in (0, 3):
        assert all(view is views[first] for view in views[first:first + 3])
    assert not any(torch.equal(views[i], views[j]) for i, j in ((0, 3), (3, 6), (0, 6)))
    for number in range(2):
        played.step(random.Random(number))
    assert len(passes) == 5
    played.step(random.Random(9))
    assert len(passes) == 6 and played.turn == 'student'  # the images moved: a new lesson


def test_student_learns_inner_maps_and_is_judged_by_the_others():
    played, _ = game()
    losses = []
    played.update = lambda loss: losses.append(loss.item())
    plain = played.student_update(random.Random(0))
    teacher, student, extra = played.teacher, played.student, torch.ones(2, 4)
    played.teacher = lambda x, visit=None, visit_heads=None: visit(extra) or teacher(x)
    played.student = lambda x, visit=None, visit_heads=None: visit(3 * extra) or student(x)
    played.uses, played.lesson = 0, None
    played.lessons -= 1  # the same batch
    assert played.student_update(random.Random(0)) == plain
    assert losses[1] == pytest.approx((losses[0] + 4) / 2)


def test_each_head_and_query_counts_the_same():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    expected = torch.stack([1 - 2 * t @ s / (t @ t + s @ s)
                            for t, s in zip(teacher.reshape(-1, 4), student.reshape(-1, 4))]).mean()
    torch.testing.assert_close(head_dissimilarity(teacher, student), expected)
    scale = torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    torch.testing.assert_close(head_dissimilarity(teacher * scale, student * scale), expected)
    assert head_dissimilarity(teacher, teacher) == 0 and head_dissimilarity(teacher, -teacher) == 2
    assert head_dissimilarity(0 * teacher, 0 * teacher) == 0


def test_student_learns_what_heads_put_out_where_asked():
    played, _ = game(heads=3.0)
    losses = []
    played.update = lambda loss: losses.append(loss.item())
    plain = played.student_update(random.Random(0))
    teacher, student, extra = played.teacher, played.student, torch.ones(2, 4, 5, 4)
    played.teacher = lambda x, visit=None, visit_heads=None: visit_heads(extra) or teacher(x)
    played.student = lambda x, visit=None, visit_heads=None: visit_heads(3 * extra) or student(x)
    played.uses, played.lesson = 0, None
    played.lessons -= 1  # the same batch
    assert played.student_update(random.Random(0)) == plain
    assert losses[1] == pytest.approx(losses[0] + 3 * 0.4)


def test_images_of_the_game_differ_by_what_tells_them_apart():
    played, _ = game()
    played.synthesis = SynthesisConfig(entropy=0.0, diversity=1.0)
    played.telling = lambda images: nullcontext(lambda features: [features[0].new_tensor([[1.0, 0.0], [0.0, 1.0]])])
    played.turn = 'images'
    assert abs(played.step(random.Random(0))['diversity']) < 0.05  # orthogonal; those of the student are alike
    played.telling = lambda images: nullcontext(lambda features: [torch.ones(2, 2)])
    played.turn = 'images'
    assert played.step(random.Random(0))['diversity'] < -1


def test_the_game_is_over_when_looks_find_no_better_student():
    played, _ = game(patience=2, evaluate_every=1, student_patience=1000, lower=1e-9)
    found = iter((0.5, 0.4, 0.45, 0.3, 0.31, 0.32))
    played.evaluate = lambda: next(found)
    played.best = 1.0
    assert [played.step(random.Random(0)) and played.over for _ in range(6)] == [False] * 5 + [True]
    assert not game()[0].over


def test_averages_of_the_student_run_on_from_turn_to_turn():
    played, _ = game(lower=1e-9, upper=1e9, student_patience=2, image_patience=2, view_updates=2)
    starts = []
    for number in range(8):
        played.step(random.Random(number))
        if played.turn_updates == 1:
            starts.append((played.turn, played.turn_start, played.student_average, played.average))
    turns = [turn for turn, *_ in starts]
    assert turns == ['student', 'images', 'student', 'images']
    assert starts[2][1] == starts[1][2] and starts[1][1] == starts[1][3]


def test_state_carries_the_game_on():
    first, student = game(student_patience=5, evaluate_every=2, lower=1e-9, image_patience=3, view_updates=3)
    for number in range(12):  # the fourth of the student's second turn: in the middle of a lesson
        first.step(random.Random(number))
    assert first.turn == 'student' and first.uses == 1
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(student.state_dict())
    torch.manual_seed(0)
    second, other = game(student_patience=5, evaluate_every=2, lower=1e-9, image_patience=3, view_updates=3)
    second.teacher.load_state_dict(first.teacher.state_dict())
    other.load_state_dict(weights)
    second.load_state_dict(state)
    second.holdout = first.holdout
    assert second.turn == first.turn and second.best == first.best
    view, maps, *_ = first.lesson
    again, again_maps, *_ = second.new_lesson(second.seed)  # drawn again as it was
    assert torch.equal(view, again) and torch.equal(maps[0], again_maps[0])
    seen = []
    for played in (first, second):  # the student's Adam is the runner's to restore
        played.update = seen.append
        seen.append(played.step(random.Random(9)))
    assert seen[1] == seen[3] and torch.equal(seen[0], seen[2])
    second.turn = first.turn = 'images'
    assert first.step(random.Random(9)) == second.step(random.Random(9))


def test_images_on_which_the_objective_is_no_number_are_an_error():
    optimizer = ImageOptimizer(torch.zeros(1, 3, 4, 4), -torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), 0.1)
    with pytest.raises(UserError, match='objective became nan.*without --amp'):
        optimizer.step(lambda images: images.mean() * float('nan'))
    assert torch.equal(optimizer.images, torch.zeros(1, 3, 4, 4))
