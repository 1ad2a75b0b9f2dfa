"""launch/: every file is what its tool accepts, and names what the server has."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import helpers
import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ladder_jax import cli
from ladder_jax.arguments import parse
from ladder_jax.config import from_recipe
from ladder_jax.data.tokenizer import ByteTokenizer
from ladder_jax.server import access, app, command

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
DOCKERFILE = (LAUNCH / "Dockerfile").read_text()
MANIFESTS = {
    f"{path.stem}-{resource['kind']}": resource
    for path in sorted((LAUNCH / "kubernetes").glob("*.yaml"))
    for resource in yaml.safe_load_all(path.read_text())
}
# The fields of a LeaderWorkerSet that the manifests use, without pods: those of
# leaderworkerset.x-k8s.io/v1. Its schema is not among Kubernetes' own, nor is that of
# JobSet: jobset.x-k8s.io/v1alpha2.
LEADER_WORKER_SET = {
    "rolloutStrategy": {
        "type": "RollingUpdate",
        "rollingUpdateConfiguration": {"maxUnavailable": int, "maxSurge": int},
    },
    "leaderWorkerTemplate": {
        "size": int,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": dict,
        "workerTemplate": dict,
    },
}
JOB_SET = {
    "failurePolicy": {"maxRestarts": int, "rules": list},
    "replicatedJobs": list,
}
# The kinds that are not Kubernetes' own.
CUSTOM = {"LeaderWorkerSet": LEADER_WORKER_SET, "JobSet": JOB_SET}
# What LeaderWorkerSet puts into the environment of its pods.
LEADER_WORKER_VARIABLES = {
    "LWS_LEADER_ADDRESS": "leader",
    "LWS_GROUP_SIZE": "4",
    "LWS_WORKER_INDEX": "3",
}


def tool(name: str) -> str:
    """The path of a program that a package of the extra [test] installs."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"there is no {name}: pip install -e '.[test]'")
    return str(path)


def check(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- scripts, HAProxy


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
    check(tool("shellcheck"), path)


def test_haproxy_accepts_its_configuration():
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if program is None:
        pytest.skip("there is no haproxy: `make test-tools` installs it")
    check(program, "-c", "-f", LAUNCH / "haproxy.cfg")


# ---------------------------------------------------------------- Docker


def test_hadolint_finds_nothing():
    check(tool("hadolint"), "--failure-threshold", "info", LAUNCH / "Dockerfile")


def test_the_image_gets_what_it_copies():
    """Each path exists, and .dockerignore lets it through."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    paths = [path for line in copied for path in line.split()]
    assert "ladder_jax" in paths and "*" in ignored
    for path in paths:
        assert (ROOT / path).exists() and f"!{path}" in ignored, path


def test_the_devices_of_the_image_are_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    devices = re.search(r"^ +(cuda.*|tpu.*)\) extras=", DOCKERFILE, re.M)[1].split(
        " | "
    )
    assert {"cuda12", "cuda13", "tpu"} == set(devices) <= set(extras)
    assert "serve" in extras


def test_the_image_starts_the_server():
    first = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[1])
    words = first + json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.M)[1])
    assert words[:2] == ["ladder-jax", "serve"]
    arguments = parse(command.Arguments, words[2:], "serve")
    assert (arguments.host, arguments.port) == ("0.0.0.0", 8000)
    assert "EXPOSE 8000" in DOCKERFILE and ":8000/health" in DOCKERFILE


def test_the_package_has_the_files_of_the_page():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = config["package-data"]["ladder_jax.server"]
    folder = ROOT / "ladder_jax" / "server"
    there = {path for path in (folder / "static").rglob("*") if path.is_file()}
    assert there and there == {path for p in patterns for path in folder.glob(p)}


# ---------------------------------------------------------------- Kubernetes


def pod_templates(resource: dict) -> list[dict]:
    if resource["kind"] == "Deployment":
        return [resource["spec"]["template"]]
    if resource["kind"] == "LeaderWorkerSet":
        template = resource["spec"]["leaderWorkerTemplate"]
        return [template["leaderTemplate"], template["workerTemplate"]]
    return []  # those of a JobSet: its Jobs are validated as Jobs


PODS = {
    f"{name}-{i}": template
    for name, resource in MANIFESTS.items()
    for i, template in enumerate(pod_templates(resource))
}


JOB_SETS = {
    name: resource["spec"]
    for name, resource in MANIFESTS.items()
    if resource["kind"] == "JobSet"
}


def validate(resource: dict) -> None:
    """Fails for a field that Kubernetes does not know, too."""
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("resource", MANIFESTS.values(), ids=MANIFESTS)
def test_kubernetes_accepts_the_manifest(resource):
    if resource["kind"] not in CUSTOM:
        return validate(resource)
    for template in pod_templates(resource):
        template = dict(metadata={}, template=template)
        validate(dict(apiVersion="v1", kind="PodTemplate", **template))
    known = dict(apiVersion=str, kind=str, metadata=dict, spec=CUSTOM[resource["kind"]])
    assert_known(resource, known)
    if resource["kind"] == "JobSet":
        for job in resource["spec"]["replicatedJobs"]:
            assert_known(job, dict(name=str, replicas=int, template=dict))
            about = dict(apiVersion="batch/v1", kind="Job", metadata={})
            validate(about | job["template"])


def assert_known(value: dict, known: dict) -> None:
    assert value.keys() <= known.keys()
    for name, item in value.items():
        expected = known[name]
        if isinstance(expected, dict):
            assert_known(item, expected)
        elif isinstance(expected, type):
            assert isinstance(item, expected), name
        else:
            assert item == expected, name


def test_a_wrong_manifest_is_found():
    resource = dict(MANIFESTS["serve-Deployment"])
    resource["spec"] = resource["spec"] | {"replica": 2}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        validate(resource)


@pytest.mark.parametrize("template", PODS.values(), ids=PODS)
def test_a_pod_runs_the_server(template):
    (container,) = template["spec"]["containers"]
    words = [
        re.sub(r"\$\((\w+)\)", lambda m: LEADER_WORKER_VARIABLES[m[1]], word)
        for word in container["args"]
    ]
    assert words[0] == "serve"
    arguments = parse(command.Arguments, words[1:], "serve")
    arguments.options()  # raises if a value is not accepted
    assert arguments.host == "0.0.0.0"
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert grace > arguments.drain_delay + arguments.drain_timeout
    names = {variable["name"] for variable in container["env"]}
    assert names == {access.KEYS_VARIABLE}
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    user = template["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:" in DOCKERFILE
    assert container["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize(
    "template",
    [template for template in PODS.values() if "ports" in str(template)],
    ids=[name for name, template in PODS.items() if "ports" in str(template)],
)
def test_the_probes_ask_for_paths_of_the_server(template):
    (container,) = template["spec"]["containers"]
    paths = app.create_app().openapi()["paths"]
    probes = {
        kind: container[f"{kind}Probe"]["httpGet"]
        for kind in ("startup", "readiness", "liveness")
    }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in probes.values():
        assert probe["path"] in paths
        assert ports[probe["port"]] == 8000
    assert probes["liveness"]["path"] == "/health"  # a server that drains is alive
    assert probes["readiness"]["path"] == probes["startup"]["path"] == "/ready"
    annotations = template["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "8000"


@pytest.mark.parametrize("name", ["serve", "serve_hosts"])
def test_the_parts_of_a_manifest_select_each_other(name):
    parts = {
        resource["kind"]: resource
        for key, resource in MANIFESTS.items()
        if key.startswith(f"{name}-")
    }
    workload = parts.get("Deployment") or parts["LeaderWorkerSet"]
    labels = [template["metadata"]["labels"] for template in pod_templates(workload)]
    service = parts["Service"]["spec"]["selector"]
    budget = parts["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert service.items() <= labels[0].items()
    assert all(budget.items() <= own.items() for own in labels)
    if len(labels) > 1:  # the workers take no HTTP requests
        assert not service.items() <= labels[1].items()
    target = parts["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"], target["name"]) == (
        workload["apiVersion"],
        workload["kind"],
        workload["metadata"]["name"],
    )
    assert "replicas" not in workload["spec"]  # `kubectl apply` would undo its work


# ---------------------------------------------------------------- training


def in_repository(path: str) -> str:
    """A path of the image as one of the repository: the Dockerfile copies it."""
    relative = path.removeprefix("/opt/ladder_jax/")
    assert relative != path and (ROOT / relative).exists(), path
    folder, _, name = relative.rpartition("/")
    assert re.search(rf"^COPY .*\b({folder}|{relative}) .*/", DOCKERFILE, re.M)
    return str(ROOT / relative)


@pytest.mark.parametrize("name", JOB_SETS)
def test_a_job_set_trains_a_recipe(name):
    (job,) = JOB_SETS[name]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    words = list(container["args"])
    if "command" in container:  # local.sh: a process for each GPU
        assert in_repository(*container["command"]) == str(LAUNCH / "local.sh")
        count, dashes, program, *words = words
        assert (dashes, program) == ("--", "ladder-jax")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == count
        variables = {v["name"]: v for v in container["env"]}
        assert variables.keys() == {"NODES", "NODE", "COORDINATOR"}
        assert variables["NODES"]["value"] == str(spec["completions"])
        set_name = MANIFESTS[name]["metadata"]["name"]
        first = f"{set_name}-{job['name']}-0-0.{set_name}"
        port = container["ports"][0]["containerPort"]
        assert variables["COORDINATOR"]["value"] == f"{first}:{port}"
        words.append("--distributed")  # local.sh adds it
    assert words[0] == "train"
    recipe = in_repository(words[1])
    default = cli.TrainArguments(from_recipe(recipe))
    arguments = parse(cli.TrainArguments, words[2:], "train", default)
    assert arguments.resume and arguments.hosts.distributed
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = spec["template"]["spec"]["volumes"]
    assert mounts.keys() == {volume["name"] for volume in volumes}
    assert container["workingDir"] in mounts.values()


@pytest.mark.parametrize("name", JOB_SETS)
def test_a_job_set_starts_again_unless_a_mistake_ended_it(name):
    policy = JOB_SETS[name]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = JOB_SETS[name]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = spec["podFailurePolicy"]["rules"]
    (container,) = spec["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    assert codes["containerName"] == container["name"]
    assert codes["operator"] == "In" and codes["values"] == [1, 2]


# ---------------------------------------------------------------- metrics


DASHBOARD = json.loads((LAUNCH / "grafana.json").read_text())
TARGETS = {
    f"{panel['title']}-{target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}


@pytest.mark.parametrize("expression", TARGETS.values(), ids=TARGETS)
def test_a_query_of_the_dashboard_names_metrics_of_the_server(expression, metrics):
    promql_parser.parse(expression.replace("$__rate_interval", "1m"))
    names = re.findall(r"ladder_jax_\w+", expression)
    assert names and set(names) <= metrics, set(names) - metrics


@pytest.mark.parametrize("name", ["serve", "serve_hosts"])
def test_the_autoscaler_reads_a_metric_of_the_server(name, metrics):
    (metric,) = MANIFESTS[f"{name}-HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in metrics


def test_the_dashboard_has_no_panel_twice_and_none_overlaps_another():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(
            panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]
        )
        for y in range(
            panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]
        )
    ]
    assert len(set(cells)) == len(cells) and max(cells)[0] < 24


@pytest.fixture(scope="module")
def metrics():
    """The names of the metrics of a server, as Prometheus stores them."""
    model = helpers.small_model(vocab_size=264, max_length=64)
    engine = helpers.make_engine(model, tokenizer=ByteTokenizer())
    text = app.create_app(engine).state.serving.metrics.text().decode()
    names = set()
    for family in text_string_to_metric_families(text):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
        names |= {family.name + end for end in ends.get(family.type, [""])}
    return names
