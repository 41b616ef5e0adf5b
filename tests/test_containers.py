"""Both images use the pinned versions and an unprivileged user; their steps and health check run."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl.recipe import load_recipe
from tests.dockerfile import Stage, context_files, read_dockerfile

PROJECT = Path(__file__).parent.parent
DOCKER = PROJECT / "docker"
FILES = {name: DOCKER / f"{name}.Dockerfile" for name in ("cpu", "cuda")}
MOUNTS = sys.platform == "linux" and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


@pytest.fixture(params=["cpu", "cuda"])
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return read_dockerfile(FILES[request.param])


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    parts = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    return {part["kind"]: part["spec"] | {"name": part["metadata"]["name"]} for part in parts}


@pytest.mark.skipif(not MOUNTS, reason="mounts folders and changes users, which needs root on Linux")
def test_the_steps_and_the_health_check_run() -> None:
    """They run in a clean root with this Python's libraries; `make docker-steps` downloads them instead."""
    name = "cpu" if version("torch").endswith("+cpu") else "cuda"
    steps = [sys.executable, "-m", "tests.docker_steps", "--installed", str(FILES[name])]
    done = subprocess.run(steps, cwd=PROJECT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert sum(" RUN " in line for line in said) == 5
    assert "healthcheck" in said[-1]
    assert "as user 10001:10001" in said[-1]


def test_make_and_both_images_install_by_one_script(stages: list[Stage]) -> None:
    ran = [step.text for stage in stages for step in stage.instructions if step.keyword == "RUN"]
    assert sum("docker/install.sh" in text for text in ran) == 3
    makefile = (PROJECT / "Makefile").read_text()
    assert makefile.count("docker/install.sh") == 3
    assert not re.search(r"pip3? +install", makefile + " ".join(ran))
    script = (DOCKER / "install.sh").read_text()
    assert re.findall(r"^ *pip install .*$", script, re.MULTILINE) == [
        '    pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt "$@"'
    ]


def test_what_the_project_names_is_pinned() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = re.findall(r"^([\w.-]+)==", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {normal(re.split(r"[^\w.-]", one)[0]) for one in named} <= {normal(name) for name in pinned}


def test_a_build_of_torch_that_pip_cannot_find_is_refused_with_the_remedy() -> None:
    (pin,) = re.findall(r"^torch==(.*)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    environment = {**os.environ, **nowhere, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [DOCKER / "install.sh", "torch", "other"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"torch=={pin}+other" in done.stderr  # pip's own words
    assert "TORCH_INDEX" in done.stderr


def test_the_images_differ_only_where_they_say_so() -> None:
    images = {name: read_dockerfile(file) for name, file in FILES.items()}
    steps = {
        name: [str(step) for stage in stages for step in stage.instructions] for name, stages in images.items()
    }
    only_cpu = [step for step in steps["cpu"] if step not in steps["cuda"]]
    only_cuda = [step for step in steps["cuda"] if step not in steps["cpu"]]
    assert [step.split()[0] for step in only_cpu] == ["ARG", "RUN", "HEALTHCHECK"]
    assert [step.split()[0] for step in only_cuda] == ["RUN", "ENV", "HEALTHCHECK"]
    assert only_cpu[1].endswith("docker/install.sh torch cpu")
    assert only_cuda[0].endswith("docker/install.sh torch")
    assert only_cpu[2].replace('["healthcheck"]', '["healthcheck", "cuda"]') == only_cuda[2]
    (base,) = {stage.base for stages in images.values() for stage in stages}
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)


def test_the_image_is_not_root_and_keeps_runs_and_caches_in_volumes(
    stages: list[Stage], compose: dict[str, Any], kubernetes: dict[str, Any]
) -> None:
    image = stages[-1]
    user, volumes, environment = image.last("USER").text, image.last("VOLUME").words, image.environment()
    assert re.fullmatch(r"\d{4,}:\d{4,}", user)  # a number: Kubernetes' runAsNonRoot knows no names
    keywords = [step.keyword for step in image.instructions]
    assert not {"RUN", "COPY"} & set(keywords[keywords.index("USER") :])
    assert volumes == [f"{image.last('WORKDIR').text}/runs", environment["XDG_CACHE_HOME"]]
    assert environment["HF_HOME"].startswith(environment["XDG_CACHE_HOME"] + "/")
    assert image.last("ENTRYPOINT").words == ["perl-rlhf"]

    pod = kubernetes["Job"]["template"]["spec"]
    assert "{runAsUser}:{runAsGroup}".format(**pod["securityContext"]) == user
    for container in (*pod["initContainers"], *pod["containers"]):
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == [*volumes, "/tmp"]
    for service in compose["services"].values():
        assert [volume.split(":")[1] for volume in service["volumes"]] == volumes


def test_the_context_is_what_is_copied(stages: list[Stage]) -> None:
    copies = [step for stage in stages for step in stage.instructions if step.keyword == "COPY"]
    assert {source for step in copies for source in step.words[:-1]} == set(context_files(PROJECT))


def test_compose_builds_these_files_and_runs_a_recipe(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        built, image = service["build"], read_dockerfile(FILES[name])[-1]
        assert (DOCKER / built["context"] / built["dockerfile"]).resolve() == FILES[name]
        arguments = [step.text.split("=")[0] for step in image.instructions if step.keyword == "ARG"]
        assert list(built.get("args", {})) == arguments
        command, recipe = service["command"]
        assert command == "run"
        assert load_recipe(PROJECT / recipe.removeprefix("${RECIPE:-").removesuffix("}"))


def test_the_kubernetes_job_goes_on_after_its_pod(kubernetes: dict[str, Any]) -> None:
    pod = kubernetes["Job"]["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"
    assert pod["terminationGracePeriodSeconds"] >= 300
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume
    ]
    assert claims == [kubernetes["PersistentVolumeClaim"]["name"]]
    (check,), (run,) = pod["initContainers"], pod["containers"]
    assert check["command"] == read_dockerfile(FILES["cuda"])[-1].health_check()
    command, recipe = run["args"]
    assert command == "run"
    assert load_recipe(PROJECT / recipe)
