"""What a person reads after a natural mistake in a manifest: the whole answer of kubectl apply, word for word."""

import pytest

from apiserver import Run, Server

HEAD = """
apiVersion: gpumeter.io/v1alpha1
kind: InferenceService
metadata: {name: smollm2}
"""
MODEL = "  model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}"

UNCHECKED = (
    "\n* <nil>: Invalid value: null: some validation rules were not checked because the object was invalid; correct "
    "the existing errors to complete validation"
)
"""What the API server adds when a type is wrong, because it runs rules on sound objects alone."""


def plan(rates: str) -> str:
    """A PricePlan with these rates."""
    head = "apiVersion: gpumeter.io/v1alpha1\nkind: PricePlan\nmetadata: {name: mistaken}\n"
    return f"{head}spec: {{currency: USD, rates: {rates}}}\n"


MISTAKES = {
    "a field with a typing error": (
        f"{HEAD}spec:\n{MODEL}\n  replica: 2\n",
        'Error from server (BadRequest): error when creating "STDIN": InferenceService in version "v1alpha1" cannot be '
        'handled as a InferenceService: strict decoding error: unknown field "spec.replica"',
    ),
    "a field in the wrong place": (
        f"{HEAD}spec:\n{MODEL}\n  maxBatchSize: 8\n",
        'Error from server (BadRequest): error when creating "STDIN": InferenceService in version "v1alpha1" cannot be '
        'handled as a InferenceService: strict decoding error: unknown field "spec.maxBatchSize"',
    ),
    "no model": (
        f"{HEAD}spec: {{replicas: 1}}\n",
        'The InferenceService "smollm2" is invalid: \n* spec.model: Required value' + UNCHECKED,
    ),
    "a web address as the model": (
        f"{HEAD}spec:\n  model: {{uri: 'https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct'}}\n",
        'The InferenceService "smollm2" is invalid: spec.model.uri: Invalid value: '
        '"https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct": spec.model.uri must begin with hf://, pvc://, '
        "file://, s3:// or oci://, for example hf://HuggingFaceTB/SmolLM2-135M-Instruct.",
    ),
    "a model without its organisation": (
        f"{HEAD}spec:\n  model: {{uri: hf://SmolLM2-135M-Instruct}}\n",
        'The InferenceService "smollm2" is invalid: spec.model.uri: Invalid value: "hf://SmolLM2-135M-Instruct": Write '
        "a Hugging Face model as hf://ORGANISATION/NAME, for example hf://HuggingFaceTB/SmolLM2-135M-Instruct; a "
        "branch, tag or commit goes into spec.model.revision.",
    ),
    "two who write replicas": (
        f"{HEAD}spec:\n{MODEL}\n  replicas: 2\n  scaling: {{maxReplicas: 4}}\n",
        'The InferenceService "smollm2" is invalid: spec: Forbidden: Set spec.replicas (a fixed number) or '
        "spec.scaling (gpumeter's autoscaler), not both; remove one of them. kubectl scale, an HPA and KEDA write "
        "spec.replicas.",
    ),
    "text where a number belongs": (
        f"{HEAD}spec:\n{MODEL}\n  engine: {{maxBatchSize: many}}\n",
        'The InferenceService "smollm2" is invalid: \n* spec.engine.maxBatchSize: Invalid value: "string": '
        'spec.engine.maxBatchSize in body must be of type integer: "string"' + UNCHECKED,
    ),
    "a minimum above the maximum": (
        f"{HEAD}spec:\n{MODEL}\n  scaling: {{minReplicas: 4, maxReplicas: 2}}\n",
        'The InferenceService "smollm2" is invalid: spec.scaling: Forbidden: spec.scaling.minReplicas must not be more '
        "than spec.scaling.maxReplicas; lower the first or raise the second.",
    ),
    "GPUs that no engine would use": (
        f"{HEAD}spec:\n{MODEL}\n  resources: {{gpu: {{count: 2, class: h100}}}}\n",
        'The InferenceService "smollm2" is invalid: spec: Forbidden: Each pod runs one engine over all of its GPUs, so '
        "spec.parallelism.tensor must equal spec.resources.gpu.count (and be 1 when the count is 0, which means CPU); "
        "to use more GPUs with a small model raise spec.replicas.",
    ),
    "a duration in words": (
        f"{HEAD}spec:\n{MODEL}\n  drain: {{timeout: 2 minutes}}\n",
        'The InferenceService "smollm2" is invalid: spec.drain.timeout: Invalid value: "2 minutes": Write '
        "spec.drain.timeout as a duration from 1s to 1h, for example 120s.",
    ),
    "memory in a unit that Kubernetes does not know": (
        f"{HEAD}spec:\n{MODEL}\n  resources: {{memory: 16GB}}\n",
        'The InferenceService "smollm2" is invalid: spec.resources.memory: Invalid value: "16GB": Write '
        "spec.resources.memory as a quantity of at least 256Mi, for example 32Gi; a number without a unit means bytes.",
    ),
    "a name that is too long": (
        "\napiVersion: gpumeter.io/v1alpha1\nkind: InferenceService\n"
        f"metadata: {{name: the-instruction-tuned-variant-of-smollm2-135m}}\nspec:\n{MODEL}\n",
        'The InferenceService "the-instruction-tuned-variant-of-smollm2-135m" is invalid: metadata.name: Forbidden: '
        "The name of an InferenceService may have at most 40 characters, because it begins the names of its "
        "Deployment, Services and usage reports; choose a shorter metadata.name.",
    ),
    "a price as a number": (
        plan("[{gpuClass: h100, perGpuHour: 2.5}]"),
        'The PricePlan "mistaken" is invalid: \n* spec.rates[0].perGpuHour: Invalid value: "number": '
        'spec.rates[0].perGpuHour in body must be of type string: "number"' + UNCHECKED,
    ),
    "two prices at once": (
        plan('[{gpuClass: h100, perGpuHour: "2.50"}, {gpuClass: h100, perGpuHour: "2.20"}]'),
        'The PricePlan "mistaken" is invalid: spec.rates: Forbidden: Two rates of one gpuClass begin at the same time, '
        "so the price would be in doubt; give each rate of a gpuClass its own effectiveFrom.",
    ),
    "a slice of a GPU that the plan does not price": (
        plan('[{gpuClass: a100, perGpuHour: "2"}, {gpuClass: h100.1g.10gb, of: h100, fraction: "1/7"}]'),
        'The PricePlan "mistaken" is invalid: spec.rates: Forbidden: A rate names in of a gpuClass that has no '
        "perGpuHour of its own in this plan; add a rate with perGpuHour for the whole GPU, or give the slice a "
        "perGpuHour.",
    ),
    "a price that changes within a minute": (
        plan('[{gpuClass: h100, perGpuHour: "2", effectiveFrom: "2027-01-01T00:00:30Z"}]'),
        'The PricePlan "mistaken" is invalid: spec.rates[0].effectiveFrom: Invalid value: "2027-01-01T00:00:30Z": '
        "Let a price change on a whole minute, for example 2027-01-01T00:00:00Z; usage records are cut there, so none "
        "of them has two prices.",
    ),
}


def test_there_are_ten_mistakes_of_an_inference_service_at_least() -> None:
    assert sum("InferenceService" in manifest for manifest, _ in MISTAKES.values()) >= 10


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_natural_mistake_is_refused_in_words_that_say_what_to_do(
    server: Server, namespace: str, kubectl: Run, mistake: str
) -> None:
    manifest, answer = MISTAKES[mistake]
    refused = kubectl("apply", "-n", namespace, "-f", "-", stdin=manifest, check=False)
    assert refused.returncode == 1
    assert refused.stderr.strip() == answer
    assert kubectl("get", "misvc", "-n", namespace, "-o", "name").stdout == ""


def test_several_mistakes_are_told_at_once(server: Server, namespace: str, kubectl: Run) -> None:
    spec = "{model: {uri: smollm2}, replicas: 1, scaling: {maxReplicas: 2}, drain: {timeout: 1d}}"
    manifest = f"{HEAD}spec: {spec}\n"
    refused = kubectl("apply", "-n", namespace, "-f", "-", stdin=manifest, check=False).stderr
    for told in ("* spec: Forbidden:", "* spec.model.uri: Invalid value:", "* spec.drain.timeout: Invalid value:"):
        assert told in refused
