"""The world `gaussians`: closed forms against autograd and against samples."""

import math

import pytest
import torch

from retouch.core.diffusion.guidance import cfg
from retouch.core.diffusion.process import EDM, VP, Flow
from retouch.core.diffusion.sampling import sample
from retouch.core.errors import InputError
from retouch.worlds import names
from retouch.worlds.gaussians import Mixture, lattice, line, only, ring

UNEVEN = Mixture(torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, 0.5]]), 0.3, torch.tensor([1.0, 2.0, 1.0]))
X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.8, 0.6), (1.0, 5.0), (0.3, 0.7)])
def test_score_is_the_gradient_of_the_log_density_and_x0_follows_from_it(alpha, sigma):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(UNEVEN.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(UNEVEN.score(X, alpha, sigma), gradient)
    tweedie = (X + sigma**2 * gradient) / alpha
    torch.testing.assert_close(UNEVEN.x0(X, alpha, sigma), tweedie)


def test_the_density_integrates_to_one():
    grid = torch.linspace(-4, 6, 400, dtype=torch.float64)
    area = UNEVEN.log_density(torch.cartesian_prod(grid, grid)).exp().sum() * (10 / 399) ** 2
    assert float(area) == pytest.approx(1, abs=1e-3)


def test_draws_follow_the_mixture():
    modes, x = UNEVEN.draw_with_modes(20_000, seed=1)
    torch.testing.assert_close(modes.bincount() / 20_000, torch.tensor([0.25, 0.5, 0.25]), atol=0.02, rtol=0)
    for mode in range(3):
        torch.testing.assert_close(x[modes == mode].mean(0), UNEVEN.means[mode].float(), atol=0.02, rtol=0)
        assert float(x[modes == mode].std()) > 0.25
    assert torch.equal(UNEVEN.draw(10, seed=1), UNEVEN.draw(10, seed=1))
    assert not torch.equal(UNEVEN.draw(10, seed=1), UNEVEN.draw(10, seed=2))


@pytest.mark.parametrize("process", [VP.linear(), EDM(), Flow()])
def test_sampling_with_the_exact_denoiser_gives_the_mixture(process):
    mixture = ring(8)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x = sample(mixture.denoiser(process), noise, times=100)
    assert float((mixture.distances(x) < 4).double().mean()) > 0.97
    shares = mixture.responsibilities(x.double()).argmax(1).bincount(minlength=8) / 2000
    assert float(shares.min()) > 0.08


def test_conditions_choose_modes():
    mixture = line((1.0, 2.0, 3.0))
    noise = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(300) % 3
    denoiser = mixture.denoiser(VP.linear())
    x = sample(denoiser, noise, only(mixture, wanted.tolist()), times=50)
    assert float((x[:, 0] - (1 + wanted)).abs().max()) < 0.3
    every = {"modes": torch.ones(1, 3)}
    torch.testing.assert_close(sample(denoiser, noise, every, times=20), sample(denoiser, noise, times=20))
    guided = sample(denoiser, noise, only(mixture, [1] * 300), negative=every, times=50, guidance=cfg(2.0))
    assert float((guided - 2).abs().max()) < 0.3


def test_shapes_of_mixtures():
    assert line().means.tolist() == [[1.0], [2.0], [3.0]]
    assert ring(4).means.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    square, turned = lattice(5), lattice(5, turned=True)
    assert len(square.means) == 25 and square.means.sum() == 0
    assert float(torch.pdist(square.means).min()) == float(torch.pdist(turned.means).min()) == pytest.approx(2.0)
    assert turned.means.abs().max() == pytest.approx(4 * math.sqrt(2))
    assert float(square.distances(torch.tensor([[2.05, 0.0]]))) == pytest.approx(1.0, abs=1e-4)
    assert "gaussians" in names()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Mixture(torch.zeros(3)), r"means has shape \(3,\)"),
        (lambda: Mixture(torch.zeros(3, 2), 0), "std is 0"),
        (lambda: Mixture(torch.zeros(2, 2), 1, torch.tensor([1.0, 0.0])), "must be 2 numbers above 0"),
        (lambda: line().draw(0), "count is 0"),
        (lambda: ring(0), "modes is 0"),
        (lambda: only(line(), [3]), "modes is 3"),
    ],
)
def test_bad_input(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()
