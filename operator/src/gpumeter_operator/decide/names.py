"""Names that more than one part of the control plane must agree on: labels, annotations, a container, ports.

Owns what is written on Kubernetes objects and found again by it; each name has one constant. Does not know who writes
and who reads.
"""

API_VERSION = "gpumeter.io/v1alpha1"
SERVICE_KIND = "InferenceService"
FINALIZER = "gpumeter.io/usage"

# Labels. Everything owned carries the first five; pods and Services are selected by SERVICE_LABEL.
SERVICE_LABEL = "gpumeter.io/inferenceservice"
NAME_LABEL = "app.kubernetes.io/name"
INSTANCE_LABEL = "app.kubernetes.io/instance"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MODEL_LABEL = "llm-d.ai/model"
MANAGED_BY = "gpumeter"
WORKER_NAME = "gpumeter-worker"
API_KEY_LABEL = "gpumeter.io/api-key"  # on the Secret of an API key
TENANT_LABEL = "gpumeter.io/tenant"  # on that Secret and on a UsageReport
GRANULARITY_LABEL = "gpumeter.io/granularity"  # on a UsageReport, as the next
PHASE_LABEL = "gpumeter.io/phase"
# On a worker's pod and in its Service's selector: "false" while it gets requests, "true" while it finishes what it has.
DRAINING_LABEL = "gpumeter.io/draining"
SLICE_OF_LABEL = "kubernetes.io/service-name"  # Kubernetes' own, on an EndpointSlice

# Annotations.
STOP_ANNOTATION = "gpumeter.io/stop"  # the user's, on an InferenceService
SERVICE_UID_ANNOTATION = "gpumeter.io/service-uid"
DEVICES_ANNOTATION = "gpumeter.io/devices"
GPU_CLASS_ANNOTATION = "gpumeter.io/gpu-class"
DEVELOPMENT_ANNOTATION = "gpumeter.io/development"  # "true" on a pod that runs a notebook in place of a worker
TEMPLATE_ANNOTATION = "gpumeter.io/template"  # which template a pod was made from
CREDENTIALS_ANNOTATION = "gpumeter.io/credentials"
APPLIED_ANNOTATION = "gpumeter.io/applied"  # which manifest was applied last, to see settled objects without writing
DRAINING_SINCE_ANNOTATION = "gpumeter.io/draining-since"
DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"  # Kubernetes' own: lower goes first
FORMER_COST_ANNOTATION = "gpumeter.io/former-deletion-cost"  # somebody else's, kept while the worker drains

# The worker's container and its ports.
MAIN_CONTAINER = "main"
MODEL_VARIABLE = "GPUMETER_MODEL_URI"
REVISION_VARIABLE = "GPUMETER_MODEL_REVISION"
HTTP_PORT_NAME = "http"
HTTP_PORT = 8000
USAGE_PORT_NAME = "usage"
USAGE_PORT = 8001

# The gateway's port for the operator.
INTERNAL_PORT = 8081
