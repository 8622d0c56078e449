"""What a condition's reason means to those who go by it: the operator's events, its status and autoscaler, the gateway.

Owns these tables, so that a new reason has one place. What is in none of them is told as a warning and passes by
itself. Does not know when a reason is given, nor its sentence.
"""

# Of Ready: part of an ordinary life, so that no one need be warned.
STARTING = frozenset({"PodsStarting", "ModelLoading"})
ORDINARY = STARTING | {
    "Serving",
    "PodsLeaving",
    "WorkersDraining",
    "ContainerCreating",
    "Stopped",
    "Development",
    "ScaledToZero",
    "Deleting",
}

# Of Ready: lasts until a person changes something, so that nobody need wait.
LASTING = frozenset(
    {
        "SpecInvalid",
        "NotSupported",
        "TemplateInvalid",
        "GpuClassUnknown",
        "DevelopmentImageMissing",
        "Development",
        "NameTaken",
        "WorkloadRefused",
        "PodsRefused",
        "ImagePullFailed",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CompanionFailed",
    }
)

# Of a pod: it cannot be metered.
UNMETERED = frozenset({"JournalUnusable"})

# Of ScalingReady: not the autoscaler's own, but of those who say the number of workers in its place.
NOT_AUTOSCALED = frozenset({"FixedReplicas", "Stopped"})
