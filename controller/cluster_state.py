"""The controller's names for the cluster's state, which clients share: see common/cluster_state.py."""

from ..common.cluster_state import ClusterState, ModelCard, ReplicaState, ReplicaStatus

__all__ = ["ClusterState", "ModelCard", "ReplicaState", "ReplicaStatus"]
