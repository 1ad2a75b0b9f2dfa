"""The names of `ladder_jax`: each works in a fresh process, is typed and documented."""

import inspect
import pkgutil
import pydoc
import subprocess
import sys
import typing

import helpers
import pytest
import tiny

import ladder_jax
from ladder_jax import config

# Each runs in a process of its own, in a folder with a corpus, a recipe and a run.
USES = {
    "load": """
loaded = ladder_jax.load("loaded")
logits_TV, ids = loaded.logits("The")
print(logits_TV.shape == (len(ids), loaded.tokenizer.size))
""",
    "save_hf": """
print(ladder_jax.save_hf("loaded", "exported").name)
loaded = ladder_jax.load_hf("exported")
print(loaded.config.model.layers)
""",
    "load_hf": """
try:
    ladder_jax.load_hf("nowhere/at-all/here")
except ladder_jax.ConfigError as error:
    print(str(error).count(chr(10)))
""",
    "Engine": """
loaded = ladder_jax.load("loaded")
engine = ladder_jax.Engine(loaded.model, loaded.config.model, loaded.mesh)
print(len(engine.submit([1, 2, 3], max_tokens=4).result().tokens))
""",
    "Config": """
from ladder_jax.config import Model
print(ladder_jax.Config(Model(layers=3)).model.layers)
""",
    "ConfigError": """
print(issubclass(ladder_jax.ConfigError, ValueError))
""",
    "train": """
import ladder_jax.training
from ladder_jax.config import from_recipe
from ladder_jax.hardware import distributed
distributed.emulate(8)
done = ladder_jax.train(from_recipe("recipe.py"))
again = ladder_jax.train(from_recipe("recipe.py"), resume=True)
loaded = ladder_jax.load(done["out"])
print(done["step"], again["step"], round(done["loss"]) in range(2, 7), "loss" in again)
print(sorted(name for name in done if name.startswith("held_out")))
""",
    "plan": """
from ladder_jax.config import from_recipe
try:
    ladder_jax.plan(from_recipe("recipe.py"), "l4:1x8")
except ladder_jax.ConfigError as error:
    print(error)
""",
}
PRINTED = {
    "load": "True\n",
    "save_hf": "exported\n2\n",
    "load_hf": "0\n",
    "Engine": "4\n",
    "Config": "3\n",
    "ConfigError": "True\n",
    "train": "2 2 True False\n['held_out_bits_per_byte', 'held_out_loss']\n",
    "plan": "target='l4:1x8' is not accepted: it must be a TPU slice (v5e:2x4, "
    "v6e:2x4, v5p:2x2x2, tpu7x:2x2x1, v5e:16x16, ...) or GPUs as NODESxGPUS of h100, "
    "h200, b200 or gb200 (h100:1x8, h100:2x8)\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api")
    tiny.write_corpus(path / "corpus")
    tiny.recipe(path, train_steps=2)
    (path / "loaded").mkdir()
    tiny.write_run(path / "loaded")
    return path


def test_every_name_has_an_example_here():
    assert set(ladder_jax.__all__) == set(USES) == set(PRINTED)


@pytest.mark.parametrize("name", USES)
def test_each_name_works_as_the_first_one_of_a_process(name, folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import ladder_jax{USES[name]}"],
        cwd=folder,
        env=helpers.code_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Training's own lines come first.
    assert done.stdout.endswith(PRINTED[name])


def test_the_package_starts_without_jax():
    code = "import sys, ladder_jax; print('jax' in sys.modules, dir(ladder_jax))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=helpers.code_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    started, _, names = done.stdout.partition(" ")
    assert started == "False"
    assert all(repr(name) in names for name in ladder_jax.__all__)


def test_no_module_has_the_name_of_an_export():
    """The import of such a module would replace the function."""
    modules = {module.name for module in pkgutil.iter_modules(ladder_jax.__path__)}
    assert not modules & set(ladder_jax.__all__)


@pytest.mark.parametrize("name", ladder_jax.__all__)
def test_each_name_is_typed_and_documented(name):
    value = getattr(ladder_jax, name)
    assert inspect.getdoc(value)
    called = value.__init__ if inspect.isclass(value) else value
    if name != "ConfigError":  # Exception's own
        hints = typing.get_type_hints(called)
        assert hints.keys() >= inspect.signature(value).parameters.keys() - {"self"}
        assert "return" in hints
    assert name in ladder_jax.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = ladder_jax.trian


def test_help_shows_the_names():
    text = pydoc.plain(pydoc.render_doc(ladder_jax))
    for name in ladder_jax.__all__:
        value = getattr(ladder_jax, name)
        shown = f"class {name}" if inspect.isclass(value) else f"    {name}("
        assert shown in text
    assert "_MODULES" not in text


def test_the_api_pages_show_the_names():
    doc = pytest.importorskip("pdoc.doc")
    for name in ladder_jax.__all__:
        getattr(ladder_jax, name)  # as docs/api_pages.py does
    members = doc.Module(ladder_jax).members
    assert list(members) == ladder_jax.__all__
    assert all(member.docstring for member in members.values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("configs/demo.py", "h100:1x8"), "^config='configs/demo.py' is not accepted"),
        ((config.Config(), 8), "^target=8 is not accepted: it must be a text"),
        ((config.Config(), "h100:1x8", "serve"), "^workload='serve' is not accepted"),
        ((config.Config(), "h100:1x8", "decode", 0), "^batch=0 is not accepted"),
        ((config.Config(), "h100:1x8", "decode", 2.5), "^batch=2.5 is not accepted"),
    ],
)
def test_plan_says_which_argument_is_wrong(arguments, message):
    with pytest.raises(config.ConfigError, match=message):
        ladder_jax.plan(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(context=0), "^context=0 .* from 1 to model.max_length=2048"),
        (dict(context=4096), "^context=4096 .* from 1 to model.max_length=2048"),
        (dict(residual="late"), "^model.residual='late' is not accepted"),
        (dict(reduction="sum"), "^mesh.reduction='sum' is not accepted"),
        (dict(tensor=0), "^mesh.tensor=0 is not accepted"),
    ],
)
def test_plan_says_which_option_is_wrong(options, message):
    with pytest.raises(config.ConfigError, match=message):
        ladder_jax.plan(config.Config(), "h100:1x8", **options)


def test_train_takes_no_path_of_a_recipe():
    with pytest.raises(config.ConfigError, match="^config='demo.py' is not accepted"):
        ladder_jax.train("demo.py")
