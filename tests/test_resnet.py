"""ResNet-20 on CIFAR-10: the network against NumPy, every form of the data, runs and records."""

import dataclasses
import functools
import hashlib
import io
import lzma
import pickle
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("pooch")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import flax.linen as nn  # noqa: E402

import ef21_jax as ef21  # noqa: E402
from experiments import accuracies, records, resnet as experiment  # noqa: E402
from experiments.data import cifar10, images  # noqa: E402
from experiments.models import resnet  # noqa: E402


# The network.

TINY = resnet.ResNetConfig(blocks=1, width=2, classes=3)


def random_variables(config, shape, seed=0):
    """Parameters and statistics without the ones and zeros of the beginning."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: resnet.initial(config, jax.random.key(0), shape))
    leaves, treedef = jax.tree.flatten(shapes)
    # A variance must be positive.
    return treedef.unflatten(np.float32(rng.uniform(0.2, 1.0, leaf.shape)) - 0.1 for leaf in leaves)


def test_resnet_20_has_the_parameters_of_its_paper():
    config = resnet.ResNetConfig()
    params, stats = jax.eval_shape(lambda: resnet.initial(config, jax.random.key(0), (32, 32, 3)))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert len(kernels) == 20
    # 0.27M: kernels, a scale and a shift for each channel, and the biases of the head.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 269_722
    assert sum(leaf.size for leaf in jax.tree.leaves(stats)) == 2 * (7 * 16 + 6 * 32 + 6 * 64)


def numpy_logits(params, stats, image):
    """One image, a place at a time, in float64, by the running statistics."""

    def convolved(x, kernel, stride=1):
        height, width = x.shape[:2]
        padded = np.zeros((height + 2, width + 2, x.shape[2]))
        padded[1:-1, 1:-1] = x
        return np.array(
            [
                [
                    np.einsum("ijc,ijco->o", padded[i : i + 3, j : j + 3], kernel)
                    for j in range(0, width, stride)
                ]
                for i in range(0, height, stride)
            ]
        )

    def normalised(x, params, stats):
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        return x * params["scale"] + params["bias"]

    def block(x, params, stats, stride):
        y = convolved(x, params["conv_0"]["kernel"], stride)
        y = np.maximum(normalised(y, params["norm_0"], stats["norm_0"]), 0)
        y = convolved(y, params["conv_1"]["kernel"])
        y = normalised(y, params["norm_1"], stats["norm_1"])
        y[..., : x.shape[-1]] += x[::stride, ::stride]
        return np.maximum(y, 0)

    x = convolved(image, params["conv"]["kernel"])
    x = np.maximum(normalised(x, params["norm"], stats["norm"]), 0)
    for stage in range(3):
        name = f"stage_{stage}_block_0"
        x = block(x, params[name], stats[name], 2 if stage else 1)
    return x.mean(axis=(0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("patches", [False, True], ids=["convolutions", "products"])
def test_the_network_is_its_paper_in_numpy(patches):
    config = dataclasses.replace(TINY, patches=patches)
    params, stats = random_variables(config, (8, 8, 3))
    batch = np.float32(np.random.default_rng(1).normal(size=(2, 8, 8, 3)))
    variables = {"params": params, "batch_stats": stats}
    network = jax.jit(functools.partial(resnet.ResNet(config).apply, train=False))
    found = network(variables, batch)
    expected = [numpy_logits(params, stats, image) for image in batch]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_nine_products_are_the_convolution_and_so_is_their_gradient(stride):
    rng = np.random.default_rng(0)
    x, kernel = (np.float32(rng.normal(size=s)) for s in ((2, 6, 4, 3), (3, 3, 3, 5)))

    def products(x, kernel):
        return resnet.convolve_patches(x, kernel, (stride, stride), None)

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    (ours, pull), (theirs, pull_theirs) = (jax.vjp(f, x, kernel) for f in (products, convolution))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(pull(theirs), pull_theirs(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_in_training_a_layer_normalises_by_the_batch_and_remembers_a_tenth():
    params, stats = random_variables(TINY, (4, 4, 3))
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 4, 3)), jnp.float32)
    variables = {"params": params, "batch_stats": stats}
    apply = functools.partial(resnet.ResNet(TINY).apply, train=True, mutable="batch_stats")
    network = jax.jit(apply)
    logits, new = network(variables, batch)
    first = resnet.convolve_patches(batch, params["conv"]["kernel"], (1, 1), None)
    for name, now in (("mean", first.mean((0, 1, 2))), ("var", first.var((0, 1, 2)))):
        expected = 0.9 * stats["norm"][name] + 0.1 * now
        np.testing.assert_allclose(new["batch_stats"]["norm"][name], expected, rtol=1e-5)
    # The scale of a kernel before a normalisation is of no effect; in a test it is.
    params["conv"]["kernel"] = params["conv"]["kernel"] * 7
    again, _ = network(variables, batch)
    np.testing.assert_allclose(again, logits, rtol=1e-3)


def test_bad_networks_are_refused():
    with pytest.raises(ValueError, match="`blocks` must be at least 1, got 0"):
        resnet.ResNetConfig(blocks=0)
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1.0"):
        resnet.ResNetConfig(momentum=1.0)


# The data.

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (14, 32, 32, 3), np.uint8)
LABELS = RNG.integers(0, 10, 14).astype(np.int32)
NAMES = (*cifar10.TRAIN, *cifar10.TEST)  # here one image each but the last, which has the rest


def batch_files():
    """{name: what Krizhevsky's file of it holds}: images as three planes, labels as a list."""
    files = {}
    for i, name in enumerate(NAMES):
        own = slice(i, i + 1) if name in cifar10.TRAIN else slice(i, None)
        planes = PIXELS[own].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = [int(label) for label in LABELS[own]]
        files[name] = pickle.dumps({b"data": planes, b"labels": labels})
    return files


def write_tarball(folder):
    with tarfile.open(folder / cifar10.TARBALL, "w:gz") as archive:
        for name, content in batch_files().items():
            entry = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return [folder / cifar10.TARBALL]


def write_unpacked(folder):
    folder.mkdir(exist_ok=True)
    for name, content in batch_files().items():
        (folder / name).write_bytes(content)
    return [folder / name for name in NAMES]


def write_subset(folder, pixels=PIXELS, labels=LABELS):
    """The inverse of `decode`."""
    planes = pixels.transpose(0, 3, 1, 2).copy()
    planes[:, 0] -= planes[:, 1]
    planes[:, 2] -= planes[:, 1]
    for axis in (3, 2):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    content = io.BytesIO()
    np.save(content, planes)
    paths = [folder / name for name in cifar10.SUBSET]
    paths[0].write_bytes(lzma.compress(content.getvalue()))
    np.save(paths[1], labels)
    return paths


FORMS = {
    "tarball": write_tarball,
    "unpacked": lambda folder: write_unpacked(folder / cifar10.FOLDER),
    "unpacked itself": write_unpacked,
    "subset": write_subset,
}


def trust(monkeypatch, paths):
    """Makes the checksums those of these files, by the algorithms of the real ones."""
    for path in paths:
        algorithm = cifar10.DIGESTS[path.name].split(":")[0]
        found = hashlib.new(algorithm, path.read_bytes()).hexdigest()
        monkeypatch.setitem(cifar10.DIGESTS, path.name, f"{algorithm}:{found}")
    monkeypatch.setattr(cifar10, "SUBSET_TEST", len(PIXELS) - 5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(form, tmp_path, monkeypatch):
    trust(monkeypatch, FORMS[form](tmp_path))
    data = cifar10.load(tmp_path)
    np.testing.assert_array_equal(data.train, PIXELS[:5])
    np.testing.assert_array_equal(data.train_labels, LABELS[:5])
    np.testing.assert_array_equal(data.test, PIXELS[5:])
    np.testing.assert_array_equal(data.test_labels, LABELS[5:])
    assert data.train.dtype == np.uint8 and data.train_labels.dtype == np.int32
    other = dataclasses.replace(data, test_labels=data.test_labels[::-1])
    assert data.describe() != other.describe()


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_file_is_refused_before_it_is_opened(form, tmp_path, monkeypatch):
    paths = FORMS[form](tmp_path)
    trust(monkeypatch, paths)
    paths[0].write_bytes(paths[0].read_bytes() + b" ")
    monkeypatch.setattr(pickle, "loads", None)
    with pytest.raises(ValueError, match=f"{paths[0].name}' has the (md5|sha256) .*, not .*anew"):
        cifar10.load(tmp_path)


def test_a_folder_without_and_one_with_a_part_are_refused(tmp_path, monkeypatch):
    expected = "no CIFAR-10 in .*cifar-10-python.tar.gz.*cifar-10-batches-py.*12k_delta"
    with pytest.raises(ValueError, match=expected):
        cifar10.load(tmp_path)
    paths = write_subset(tmp_path)
    trust(monkeypatch, paths)
    paths[1].unlink()
    with pytest.raises(ValueError, match="no file '.*labels.npy'.*not complete"):
        cifar10.load(tmp_path)


def test_without_a_folder_the_tarball_is_fetched_with_its_checksum(tmp_path, monkeypatch):
    trust(monkeypatch, write_tarball(tmp_path))
    asked = []

    def retrieve(url, known_hash, fname):
        asked.append((url, known_hash))
        return str(tmp_path / fname)

    monkeypatch.setattr(cifar10.pooch, "retrieve", retrieve)
    np.testing.assert_array_equal(cifar10.load().test, PIXELS[5:])
    assert asked == [(cifar10.URL, cifar10.DIGESTS[cifar10.TARBALL])]

    def offline(url, known_hash, fname):
        raise OSError("no route")

    monkeypatch.setattr(cifar10.pooch, "retrieve", offline)
    with pytest.raises(ValueError, match="Could not fetch .*no route.*--data-dir"):
        cifar10.load()


def test_clients_have_equally_many_images_and_none_in_common():
    numbers = np.arange(23, dtype=np.uint8)
    shares, labels = images.shards(numbers[:, None, None, None], numbers.astype(np.int32), 5, 0)
    assert shares.shape == (5, 4, 1, 1, 1)
    np.testing.assert_array_equal(shares[..., 0, 0, 0], labels)
    assert len(np.unique(labels)) == 20
    other, _ = images.shards(numbers[:, None, None, None], numbers, 5, 1)
    assert not np.array_equal(shares, other)


def test_an_epoch_has_each_image_at_most_once_in_an_order_of_its_own():
    first, second = (np.asarray(images.epoch(0, number, 3, 11, 4)) for number in (1, 2))
    assert first.shape == (2, 3, 4)
    orders = [*first.transpose(1, 0, 2).reshape(3, 8), *second.transpose(1, 0, 2).reshape(3, 8)]
    for order in orders:
        assert len(np.unique(order)) == 8 and 0 <= order.min() and order.max() < 11
    assert len({tuple(order) for order in orders}) == 6


def test_pixels_are_standardised_and_pooled_by_squares():
    of = images.moments(PIXELS)
    found = np.asarray(images.standardised(jnp.asarray(PIXELS), of))
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((0, 1, 2)), 1, rtol=1e-5)
    pooled = images.pooled(PIXELS, 16)
    assert pooled.shape == (14, 16, 16, 3) and pooled.dtype == np.uint8
    np.testing.assert_array_equal(pooled[3, 5, 7], np.round(PIXELS[3, 10:12, 14:16].mean((0, 1))))
    with pytest.raises(ValueError, match="`side` must divide the images' 32, got 20"):
        images.pooled(PIXELS, 20)


def test_an_augmented_image_is_a_cut_of_the_padded_one_or_of_its_mirror():
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(300, 16, 16, 1)), jnp.float32)
    found = np.asarray(images.augmented(batch, 0, 3, 1))
    padded = np.pad(batch, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [(i, j, turn) for i in range(5) for j in range(5) for turn in (1, -1)]
    cuts = [padded[:, i : i + 16, j : j + 16][:, :, ::turn] for i, j, turn in places]
    is_cut = np.stack([np.all(cut == found, axis=(1, 2, 3)) for cut in cuts])
    np.testing.assert_array_equal(is_cut.sum(axis=0), 1)
    # All are as likely: 60 images for each row, 60 for each column, 150 for each side.
    chosen = np.array(places)[is_cut.argmax(axis=0)]
    for part, expected in zip(chosen.T, (60, 60, 150), strict=True):
        counts = np.unique(part, return_counts=True)[1]
        assert counts.sum() == 300 and abs(counts - expected).max() < 5 * expected**0.5
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):  # seed, step, client
        assert not np.array_equal(found, images.augmented(batch, *other))


# The runs.


class Shallow(nn.Module):
    """In the place of the network, which takes long to compile: one layer of each kind."""

    config: resnet.ResNetConfig

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.config.width, (3, 3), strides=2)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.config.classes)(x.reshape(len(x), -1))


@pytest.fixture
def shallow(monkeypatch):
    resnet.initial.clear_cache()
    monkeypatch.setattr(resnet, "ResNet", Shallow)
    yield
    resnet.initial.clear_cache()


SETTINGS = {
    **{"images": 12, "clients": 2, "batch_size": 3, "side": 8, "width": 2, "blocks": 1},
    **{"epochs": 1, "patches": True, "gamma": 5.0},
}


def run_of(method, **changes):
    """All that it takes to train: settings, data, the optimizer, the start and the loss."""
    config = experiment.Config(**(SETTINGS | changes)).whole()
    data = cifar10.Images(PIXELS[:12], LABELS[:12], PIXELS[12:], LABELS[12:])
    data = experiment.prepared(data, config)
    tx = experiment.METHODS[method](config.gamma, uplink=ef21.TopK(0.1), axis_name="clients")
    start, loss = experiment.start_and_loss(config, images.moments(data.train))
    return config, data, tx, start, loss


def test_an_epoch_is_ef21_on_each_clients_own_batches_with_top_k_of_all_parameters(shallow):
    config, data, tx, start, loss = run_of("EF21")
    seed, (x, stats) = 4, start(4)
    shards = images.shards(data.train, data.train_labels, config.clients, seed)
    own = [jax.tree.map(lambda leaf, j=j: leaf[j], stats) for j in range(2)]
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected, v, k, lengths, shares = x, np.zeros((2, x.size)), int(0.1 * x.size), [], []
    order = jax.jit(images.epoch, static_argnums=(2, 3, 4))(seed, 1, 2, 6, 3)
    for step, chosen in enumerate(np.asarray(order)):
        for j in range(2):
            batch = (part[j][chosen[j]] for part in shards)
            g, (share, own[j]) = gradient(expected, own[j], *batch, (seed, step, j))
            change = np.asarray(g) - v[j]
            largest = np.argsort(-np.abs(change))[:k]  # of the whole vector
            v[j, largest] += change[largest]
            shares.append(share)
        expected = jnp.asarray(expected - 5 * v.mean(axis=0), jnp.float32)
        lengths.append(5 * np.linalg.norm(v.mean(axis=0)))

    carry = (x, ef21.replicate(tx.init(x), config.clients), stats)
    advance = experiment.one_epoch(config, tx, loss)
    (found, state, found_stats), measured = advance(carry, shards, seed, 1)
    assert len(lengths) == int(state.count) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for mine, *theirs in zip(*map(jax.tree.leaves, (found_stats, *own)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured["step_length"], np.mean(lengths), rtol=1e-4)
    np.testing.assert_allclose(measured["train_accuracy"], np.mean(shares), rtol=1e-6)


def test_a_test_is_with_the_mean_of_the_clients_statistics(shallow):
    _, data, _, start, loss = run_of("EF21")
    x, stats = start(0)
    half = jnp.array([[0.5], [2.5]])
    found = experiment.tested(loss)(
        x, jax.tree.map(lambda leaf: leaf * half, stats), data.test, data.test_labels
    )
    mean = jax.tree.map(lambda leaf: 1.5 * leaf[0], stats)
    value, (share, _) = jax.jit(loss)(x, mean, data.test, data.test_labels)
    np.testing.assert_allclose(found["test_loss"], value, rtol=1e-5)
    np.testing.assert_allclose(found["test_accuracy"], share, rtol=1e-6)
    np.testing.assert_allclose(found["length"], jnp.linalg.norm(x), rtol=1e-6)


def arguments(folder, path, **changes):
    settings = {**SETTINGS, "data_dir": folder, "json": path} | changes
    patches = settings.pop("patches")
    args = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [*args, "--patches", str(patches), "--shares", "0.1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with 12 images to train on and two for testing."""
    trust(monkeypatch, write_subset(tmp_path))
    monkeypatch.setattr(cifar10, "SUBSET_TEST", 2)
    return tmp_path


def test_a_job_writes_a_record_and_goes_on_where_it_stopped(folder, shallow, capsys, monkeypatch):
    path = folder / "out" / "resnet.jsonl"
    experiment.main([*arguments(folder, path), "--methods", "normalized EF21"])
    header, lines = records.read_lines(path)
    assert header["config"]["epochs"] == 1 and str(folder) not in str(header["config"]["data_dir"])
    assert header["data"] | {"train": 12, "test": 2} == header["data"]
    assert [(line["epoch"], line["step"], line["seed"]) for line in lines] == [(0, 0, 0), (1, 2, 0)]
    # Per step a worker sends k values of 32 bits, and their places.
    k = int(0.1 * lines[1]["d"])
    assert 2 * k * 32 < lines[1]["bits_up"] < 2 * k * (32 + 16)
    assert lines[0]["bits_up"] == 0 and "train_accuracy" not in lines[0]
    np.testing.assert_allclose(lines[1]["step_length"], 5, rtol=1e-5)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "normalized EF21, k = 0.1 d, seed 0: epoch 1 of 1" in capsys.readouterr().out

    ran = []

    def recorded(config, data, share, method, seeds):
        ran.append((share, method, tuple(seeds)))
        return iter(())

    monkeypatch.setattr(experiment, "train", recorded)
    experiment.main([*arguments(folder, path), "--seeds", "2"])
    assert ran == [(0.1, "EF21", (0, 1)), (0.1, "normalized EF21", (1,))]
    assert records.read_lines(path)[1] == lines
    with pytest.raises(ValueError, match="made with config .*'gamma': 5.0.*another --json"):
        experiment.main([*arguments(folder, path), "--gamma=1"])


def made_up(share, method, seed, accuracy):
    about = {"share": share, "method": method, "seed": seed, "d": 10, "step_length": 2.0}
    last = {"train_accuracy": accuracy, "test_accuracy": accuracy, "bits_up": 3e6, "step": 7}
    first = {"test_accuracy": 0.1, "bits_up": 0, "step": 0}
    return [about | first, about | last]


def test_the_table_has_the_median_and_the_spread_of_the_seeds(tmp_path):
    path = tmp_path / "resnet.jsonl"
    values = [("EF21", 0, 0.2), ("EF21", 1, 0.3), ("EF21", 2, 0.5), ("normalized EF21", 0, None)]
    lines = [line for value in values for line in made_up(0.01, *value)]
    records.write_lines(path, [{}, *lines, *made_up(0.1, "EF21", 0, 0.9)])
    rows = accuracies.table(path).splitlines()
    assert rows[1].split()[:8] == ["EF21", "0.01", "3", "7", "3.00", "0.300", "(0.200,", "0.500)"]
    assert "nan" in rows[2] and rows[3].split()[:2] == ["EF21", "0.1"]
    assert accuracies.picture(path).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_written_when_it_is_whole_and_runs_go_seed_by_seed(folder, monkeypatch, capsys):
    path, begun = folder / "resnet.jsonl", []

    def faked(config, data, share, method, seeds):
        for seed in seeds:
            begun.append((method, seed))
            if begun.count(("EF21", 1)) == 1 and method != "EF21":
                raise KeyboardInterrupt
            yield made_up(share, method, seed, 0.2)

    monkeypatch.setattr(experiment, "train", faked)
    args = [*arguments(folder, path), "--seeds", "3"]
    first = [("EF21", 0), ("normalized EF21", 0), ("EF21", 1)]
    experiment.main(args)
    assert (
        begun == [*first, ("normalized EF21", 1)] and "goes on from here" in capsys.readouterr().out
    )
    written = [(line["method"], line["seed"]) for line in records.read_lines(path)[1][::2]]
    assert written == first
    begun.append(("EF21", 1))
    experiment.main(args)
    assert begun[5:] == [("EF21", 2), ("normalized EF21", 1), ("normalized EF21", 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("adam",)}, r"`methods` must be among .*EF21.*got \('adam',\)"),
        ({"shares": (0.1, 1.5)}, r"`shares` must lie in \(0, 1\], got \(0.1, 1.5\)"),
        ({"gamma": 0.0}, "`gamma` must be positive, got 0.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        experiment.Config(**settings)


def test_more_images_than_there_are_and_too_few_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="There are 12 images .* `images` is 50000.*ask for fewer"):
        run_of("EF21", preset="full", images=None)
    with pytest.raises(ValueError, match="each of 2 clients fewer than a batch of 7"):
        run_of("EF21", batch_size=7)


def test_the_full_preset_is_the_papers():
    config = experiment.Config(preset="full").whole()
    assert (config.epochs, config.batch_size, config.images) == (100, 128, 50_000)
    assert (config.clients, config.gamma, config.shares) == (5, 5.0, (0.01, 0.1))
    assert dataclasses.replace(config.model(), patches=False) == resnet.ResNetConfig()
