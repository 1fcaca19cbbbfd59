"""The density of first observations: its formula, its tails, and what it never does."""

import numpy as np
import pytest
import scipy.stats
import torch

from cpd.student.task_density import STD_FLOOR, TaskDensity
from tests.student.test_network import observations


def test_is_the_predictive_density_of_independent_normal_entries():
    density = TaskDensity(2, 39)
    sample, new = observations(7, seed=3).numpy(), observations(4, seed=4).numpy()
    density.fit(1, torch.from_numpy(sample))
    expected = scipy.stats.t.logpdf(
        new, df=6, loc=sample.mean(0), scale=sample.std(0, ddof=1) * np.sqrt(1 + 1 / 7)
    ).sum(1)
    log_density = density.log_density(torch.from_numpy(new))
    np.testing.assert_allclose(log_density[:, 1], expected)
    assert not log_density[:, 0].any()  # no density yet


def test_equal_observations_count_once_and_fitting_leaves_other_tasks_alone():
    density, sample = TaskDensity(3, 39), observations(5, seed=1)
    density.fit(0, sample)
    saved = {name: value[0].clone() for name, value in density.state_dict().items()}
    density.fit(2, sample.repeat(3, 1))
    for name, value in density.state_dict().items():
        torch.testing.assert_close(value[2], value[0])
        assert torch.equal(value[0], saved[name])


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_sample_of_any_size_gives_finite_densities_with_heavier_tails_if_small(count):
    density = TaskDensity(1, 39)
    density.fit(0, torch.zeros(count, 39) + torch.linspace(0.0, 1e-5, count).unsqueeze(1))
    assert (density.std_KO >= STD_FLOOR).all()
    near, far = density.log_density(torch.stack([torch.zeros(39), torch.full((39,), 0.5)]))[:, 0]
    assert torch.isfinite(far) and near > far


def test_a_difference_of_two_millimetres_in_one_entry_decides():
    rng = np.random.default_rng(0)
    low = torch.from_numpy(rng.normal(0.0, 0.05, (40, 39)))
    low[:, 5] = 0.0194
    high = low.clone()
    high[:, 5] = 0.0214
    density = TaskDensity(2, 39)
    density.fit(0, low[:20])
    density.fit(1, high[:20])
    assert density.log_density(low[20:]).argmax(1).tolist() == [0] * 20
    assert density.log_density(high[20:]).argmax(1).tolist() == [1] * 20
