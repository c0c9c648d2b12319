"""What is redirected for a workload of this machine, whoever applies it: the agent, a CNI call, or a place's maker."""

import msgspec

from tidegate.intent.annotations import policy_of
from tidegate.intent.policy import Policy
from tidegate.model import DEFAULT_PROXY_UID, Sidecar, Workload
from tidegate.node.users import group_id, user_id


def policy_for(workload: Workload, base: Policy) -> Policy:
    """What is redirected for a workload. InputErrors names all faults."""
    policy = policy_of(
        workload.namespace_annotations,
        workload.annotations,
        base,
        users=user_id,
        groups=group_id,
    )
    uids = policy.proxy.uids
    if workload.sidecar is Sidecar.OWN or DEFAULT_PROXY_UID in uids:
        return policy
    # Whatever else is exempt, the sidecar that the agent starts is: its connections would come back to it.
    proxy = msgspec.structs.replace(policy.proxy, uids=(*uids, DEFAULT_PROXY_UID))
    return msgspec.structs.replace(policy, proxy=proxy)
