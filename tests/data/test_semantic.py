import numpy as np
import pytest

from megatron_ru.data.semantic import farther_neighbours, nearest_centroids, normalised, threshold_for


def vectors(count, dimension=64, seed=1):
    return normalised(np.random.default_rng(seed).standard_normal((count, dimension)))


def full_matrix(points, to_centroid):
    """The same from the whole product in fp64."""
    wide = points.astype(np.float64)
    products = wide @ wide.T
    largest, neighbour = np.full(len(points), -1.0), np.full(len(points), -1)
    rank = np.argsort(np.argsort(to_centroid, kind="stable"))
    for n in range(len(points)):
        farther = np.flatnonzero(rank < rank[n])
        if len(farther):
            best = farther[np.argmax(products[n, farther])]
            largest[n], neighbour[n] = products[n, best], best
    return largest, neighbour


@pytest.mark.parametrize("rows", [1, 7, 64, 1000, None])
def test_streamed_rows_give_the_full_matrix(rows):
    points = vectors(333)
    to_centroid = points[:, 0].astype(np.float64)
    found = farther_neighbours(points, to_centroid, rows=rows)
    largest, neighbour = full_matrix(points, to_centroid)
    assert np.array_equal(found.neighbour, neighbour)
    np.testing.assert_allclose(found.largest, largest, rtol=0, atol=1e-15)


def test_slices_do_not_move_a_bit_even_with_duplicates():
    points = np.concatenate([vectors(100), vectors(100), vectors(50, seed=2)])
    to_centroid = np.tile(np.arange(50) / 50.0, 5)
    first = farther_neighbours(points, to_centroid, rows=1)
    for rows in (3, 50, 250):
        other = farther_neighbours(points, to_centroid, rows=rows)
        assert np.array_equal(first.largest, other.largest)
        assert np.array_equal(first.neighbour, other.neighbour)


def test_the_document_farthest_from_the_centroid_has_no_neighbour():
    points = normalised(np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1]]))
    found = farther_neighbours(points, np.array([0.9, 0.8, 0.7, 0.95]))
    assert found.neighbour.tolist() == [1, 2, -1, 2]
    assert found.largest[2] == -1


def test_one_document_and_none():
    assert farther_neighbours(vectors(1), np.zeros(1)).largest.tolist() == [-1]
    assert len(farther_neighbours(vectors(1)[:0], np.zeros(0)).largest) == 0


def test_nearest_centroids():
    centroids = vectors(20)
    points = normalised(centroids[np.arange(500) % 20] + 0.02 * vectors(500, seed=3))
    found, cosines = nearest_centroids(points, centroids)
    assert found.tolist() == (np.arange(500) % 20).tolist()
    np.testing.assert_allclose(
        cosines, np.sum(points.astype(float) * centroids[found].astype(float), axis=1), atol=1e-15
    )


@pytest.mark.parametrize("remove", [0.0, 0.1, 0.3, 0.7])
def test_threshold_removes_exactly_what_was_asked_for(remove):
    largest = np.random.default_rng(1).random(1000)
    largest[:50] = -1
    threshold = threshold_for(largest, remove)
    assert (largest >= threshold).sum() == round(remove * 1000)


def test_threshold_does_not_part_equal_cosines_nor_remove_the_farthest():
    assert threshold_for(np.array([0.9, 0.5, 0.5, 0.5, 0.1]), 0.4) == 0.9
    assert threshold_for(np.array([-1.0, -1.0, 0.2]), 1.0) == 0.2
    assert threshold_for(np.array([0.5, 0.5]), 0.5) == 2.0


def test_rows_of_zeros_stay():
    assert normalised(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("rows", [10, None])
def test_torch_gives_the_same_numbers_as_numpy(rows):
    """torch takes part when the device is not called cpu: here it is the CPU by another name."""
    points = np.concatenate([vectors(150), vectors(30), vectors(90, seed=4)])
    to_centroid = points[:, 1].astype(np.float64)
    ours, theirs = (farther_neighbours(points, to_centroid, device, rows=rows) for device in ("cpu", "cpu:0"))
    assert np.array_equal(ours.largest, theirs.largest)
    assert np.array_equal(ours.neighbour, theirs.neighbour)
    # Each centroid twice: which of the two it is, fp32 cannot tell.
    centroids = np.repeat(vectors(20, seed=9), 2, axis=0)
    found = [nearest_centroids(points, centroids, device) for device in ("cpu", "cpu:0")]
    for first, second in zip(*found, strict=True):
        assert np.array_equal(first, second)
    assert set(found[0][0] % 2) == {0}
    assert_nearest_in_fp64(points, centroids, found[0][0])


def assert_nearest_in_fp64(points, centroids, found):
    assert np.array_equal(np.argmax(points.astype(float) @ centroids.astype(float).T, axis=1), found)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_centroids_nearer_to_each_other_than_rounding_are_told_apart(device):
    base = vectors(30, seed=5)
    # A step of a rounding in one element.
    near = base.copy()
    near[:, 0] = np.nextafter(near[:, 0], np.float32(2))
    centroids, points = np.concatenate([base, near]), vectors(400, seed=6)
    found, _ = nearest_centroids(points, centroids, device)
    assert_nearest_in_fp64(points, centroids, found)
    assert 0 < (found < 30).sum() < 400


def test_a_mapped_file_goes_to_the_device_without_a_warning(tmp_path, recwarn):
    points = vectors(50)
    np.save(tmp_path / "v.npy", points)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    found, _ = nearest_centroids(mapped, mapped[:7], "cpu:0")
    assert found[:7].tolist() == list(range(7))
    assert farther_neighbours(mapped, np.zeros(50), "cpu:0").neighbour[0] == -1
    assert not [str(warning.message) for warning in recwarn]


def test_the_precision_of_products_of_others_stays(recwarn):
    torch = pytest.importorskip("torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        farther_neighbours(vectors(20), np.zeros(20), "cpu:0")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
