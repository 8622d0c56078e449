"""A notebook in place of a worker: what `spec.development.jupyter` makes of the pod.

Owns the container that runs JupyterLab, its token's Secret, and the sentences about it. A notebook and an engine on one
GPU would stretch each other's steps, and tenants would pay for it; so where there is a notebook nothing is served. What
its pod holds is allocated time that nobody measured: `unaccounted`, billed to nobody. Does not know the worker's
container beyond what it is given of it.
"""

import base64

from gpumeter_operator.decide.credentials import Credentials
from gpumeter_operator.decide.names import MAIN_CONTAINER
from gpumeter_operator.decide.owned import Manifest, owned
from gpumeter_operator.decide.spec import Problem, ServiceSpec
from gpumeter_operator.decide.template import GPUS_VARIABLE

PORT = 8888
WORKSPACE = "/workspace"
_TOKEN_FOLDER = "/etc/gpumeter/jupyter"  # noqa: S105 - where it is, not what it is
_NEEDED_MOUNTS = ("tmp", "cache", "shared-memory", "model")  # of the worker's; not its journal, nor its credentials
_TOLD = (
    *("HOME", "GPUMETER_MODEL_URI", "GPUMETER_MODEL_REVISION", "GPUMETER_MODEL_CACHE", "GPUMETER_DTYPE"),
    GPUS_VARIABLE,  # without it the image of CUDA takes every GPU of the node for a service that asked for none
)
# Kubernetes' own HTTP probes come to the pod's address, and the notebook listens to the pod itself alone.
_ALIVE = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PORT}/api', timeout=4)"


def notebook(worker: Manifest, spec: ServiceSpec, image: str) -> Manifest:
    """The container `main` that runs JupyterLab where the worker's would be, with its resources, models and limits."""
    kept = ("imagePullPolicy", "resources", "securityContext", "terminationMessagePolicy")
    return {
        "name": MAIN_CONTAINER,
        "image": spec.engine_image or image,
        **{key: worker[key] for key in kept},
        # At the pod's own address nobody is answered: a port-forward comes from inside.
        "command": ["jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={PORT}", "--port-retries=0"],
        "workingDir": WORKSPACE,
        "env": [
            *(one for one in worker["env"] if one["name"] in _TOLD),
            {"name": "JUPYTER_TOKEN_FILE", "value": f"{_TOKEN_FOLDER}/token"},
        ],
        "volumeMounts": [
            *(one for one in worker["volumeMounts"] if one["name"] in _NEEDED_MOUNTS),
            {"name": "jupyter-token", "mountPath": _TOKEN_FOLDER, "readOnly": True},
            {"name": "jupyter-workspace", "mountPath": WORKSPACE},
        ],
        "readinessProbe": {"exec": {"command": ["python3", "-c", _ALIVE]}, "periodSeconds": 10, "timeoutSeconds": 5},
    }


def notebook_volumes(worker: list[Manifest], spec: ServiceSpec) -> list[Manifest]:
    """The pod's volumes; the workspace goes with the pod unless spec.template mounts another volume in its place."""
    return [
        *(one for one in worker if one["name"] in _NEEDED_MOUNTS),
        {"name": "jupyter-token", "secret": {"secretName": secret_name(spec), "defaultMode": 0o440}},
        {"name": "jupyter-workspace", "emptyDir": {}},
    ]


def notebook_secret(spec: ServiceSpec, credentials: Credentials) -> Manifest:
    """The token, in a Secret of its own: who may open the notebook need not know the workers' credentials."""
    data = {"token": base64.b64encode(credentials.jupyter_token.encode()).decode()}
    return owned(spec, "v1", "Secret", secret_name(spec), type="Opaque", data=data)


def secret_name(spec: ServiceSpec) -> str:
    """Name of the Secret with the token."""
    return f"{spec.name}-jupyter"


def development_problems(spec: ServiceSpec, image: str) -> tuple[Problem, ...]:
    """Why there cannot be a notebook; `image` is the installation's development image, empty where it has none."""
    if not spec.jupyter or spec.engine_image or image:
        return ()
    return (
        Problem(
            "DevelopmentImageMissing",
            "spec.development.jupyter is true, but this installation names no image with JupyterLab; build one from "
            "Dockerfile.development and name it in spec.engine.image, or in developmentImage of the chart.",
        ),
    )


def how_to_open(spec: ServiceSpec) -> Problem:
    """What Ready says while the notebook runs."""
    where = f"-n {spec.namespace}"
    return Problem(
        "Development",
        "JupyterLab runs in place of a worker (spec.development.jupyter), so no request is answered. Open it with "
        f"kubectl port-forward {where} deploy/{spec.name} {PORT} at http://localhost:{PORT}; "
        f"kubectl get secret {where} {secret_name(spec)} -o jsonpath='{{.data.token}}' | base64 -d prints the token.",
    )


NOT_METERED = Problem(
    "Development",
    "JupyterLab runs in place of a worker, so nothing is measured: all of its pod's time is unaccounted, and billed to "
    "nobody.",
)
