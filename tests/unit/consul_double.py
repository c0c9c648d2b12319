"""A Consul server, community edition, as its API documentation describes it: nothing of tidegate's, faults at will.

Blocking queries wait for an index above the one that was asked with, a restored snapshot abandons them and can have a
lower index, empty lists and maps are null, namespaces and partitions are refused, tokens are asked for.
"""

import asyncio
import json
import re

from aiohttp import web

NOT_AN_ENDPOINT = "Invalid URL path: not a recognized HTTP API endpoint\n"
DENIED = (
    "Permission denied: anonymous token lacks permission 'service:read'. The anonymous token is used"
    " implicitly when a request does not specify a token."
)


class ConsulDouble:
    def __init__(self, ca=None, token=""):
        self.ca = ca
        self.token = token
        self.policy = "deny"
        self.index = 20
        self.entries = {}
        self.nodes = {}
        self.services = {}
        self.status = 0
        """Of every answer, while it is not 0."""
        self.text = None
        """Of every answer, while it is set: something in the middle that is no Consul server."""
        self.held = None
        """An event that every answer waits for, while it is set."""
        self.requests = []
        self._bell = asyncio.Condition()
        self._restored = 0
        self._runner = None
        self._port = 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self._port}"

    async def start(self):
        app = web.Application(middlewares=[self._faults])
        app.add_routes(
            [
                web.put("/v1/config", self.put_config),
                web.get("/v1/config/{kind}", self.list_config),
                web.get("/v1/config/{kind}/{name}", self.get_config),
                web.delete("/v1/config/{kind}/{name}", self.delete_config),
                web.get("/v1/catalog/nodes", self.list_nodes),
                web.get("/v1/catalog/node-services/{node}", self.node_services),
                web.put("/v1/catalog/register", self.register),
                web.put("/v1/catalog/deregister", self.deregister),
                web.get("/v1/connect/ca/roots", self.roots),
                web.get("/v1/agent/connect/ca/leaf/{service}", self.leaf),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self):
        await self._runner.cleanup()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    # What others do to its state.

    async def write(self, **entry):
        self.index += 1
        key = (entry["Kind"], entry["Name"])
        created = self.entries[key]["CreateIndex"] if key in self.entries else self.index
        self.entries[key] = entry | {"CreateIndex": created, "ModifyIndex": self.index}
        await self._ring()

    async def add(self, node, address, *services):
        self.index += 1
        self.nodes[node] = {"Node": node, "Address": address, "Datacenter": "east", "Meta": None}
        for service in services:
            self.services[node, service["ID"]] = {"Tags": None, "Meta": None} | service
        await self._ring()

    async def remove(self, node, service_id=None):
        self.index += 1
        for key in [key for key in self.services if key[0] == node]:
            if service_id in (None, key[1]):
                del self.services[key]
        if service_id is None:
            del self.nodes[node]
        await self._ring()

    async def restore(self, index):
        """An older snapshot of its state: blocking queries are abandoned, and the index is lower."""
        self.index = index
        self._restored += 1
        await self._ring()

    async def fail(self, status):
        """From now on every answer is this status; 0 ends that. Queries that wait are answered."""
        self.status = status
        self._restored += 1
        await self._ring()

    async def _ring(self):
        async with self._bell:
            self._bell.notify_all()

    # How it answers.

    @web.middleware
    async def _faults(self, request, handler):
        self.requests.append((request.method, request.path, dict(request.query)))
        if self.held is not None:
            await self.held.wait()
        if request.match_info.http_exception is not None:
            return web.Response(status=404, text=NOT_AN_ENDPOINT)
        if self.token and request.headers.get("X-Consul-Token") != self.token:
            said = "ACL not found" if "X-Consul-Token" in request.headers else DENIED
            return web.Response(status=403, text=said)
        for name, what in (("ns", "Namespaces"), ("partition", "Partitions")):
            if name in request.query:
                text = f'Invalid query parameter: "{name}" - {what} are a Consul Enterprise feature'
                return web.Response(status=400, text=text)
        if self.status:
            return web.Response(status=self.status, text="rpc error: No cluster leader")
        response = await handler(request)
        if self.text is not None:
            return web.Response(text=self.text)
        if self.status:
            return web.Response(status=self.status, text="rpc error: No cluster leader")
        response.headers["X-Consul-Default-Acl-Policy"] = self.policy
        return response

    async def _query(self, request, read):
        asked = int(request.query.get("index", "0"))
        if asked:
            seconds = float(re.fullmatch(r"([\d.]+)s", request.query.get("wait", "300s"))[1])
            restored = self._restored
            try:
                async with asyncio.timeout(seconds), self._bell:
                    await self._bell.wait_for(
                        lambda: self.index > asked or self._restored != restored
                    )
            except TimeoutError:
                pass
        return self._json(read(), {"X-Consul-Index": str(self.index)})

    def _json(self, value, headers=None):
        return web.Response(
            text=json.dumps(value), content_type="application/json", headers=headers
        )

    async def put_config(self, request):
        entry = await request.json()
        sources = entry.get("Sources") or []
        for raw in (entry, *sources):
            for key in ("Namespace", "Partition"):
                if key in raw:
                    text = f'Request decoding failed: 1 error occurred: invalid config key "{key}"'
                    return web.Response(status=400, text=text)
        known = self.entries.get((entry["Kind"], entry["Name"]), {}).get("ModifyIndex", 0)
        if "cas" in request.query and int(request.query["cas"]) != known:
            return self._json(False)
        await self.write(**entry)
        return self._json(True)

    async def list_config(self, request):
        kind = request.match_info["kind"]
        return await self._query(
            request, lambda: [entry for key, entry in self.entries.items() if key[0] == kind]
        )

    async def get_config(self, request):
        kind, name = request.match_info["kind"], request.match_info["name"]
        if (kind, name) not in self.entries:
            text = f'Config entry not found for "{kind}" / "{name}"'
            return web.Response(status=404, text=text)
        return await self._query(request, lambda: self.entries[kind, name])

    async def delete_config(self, request):
        key = (request.match_info["kind"], request.match_info["name"])
        known = self.entries.get(key, {}).get("ModifyIndex", 0)
        if "cas" in request.query and int(request.query["cas"]) != known:
            return self._json(False)
        self.entries.pop(key, None)
        self.index += 1
        await self._ring()
        return self._json(True if "cas" in request.query else {})

    async def list_nodes(self, request):
        return await self._query(request, lambda: list(self.nodes.values()))

    async def node_services(self, request):
        node = request.match_info["node"]

        def read():
            services = [one for key, one in self.services.items() if key[0] == node]
            return {"Node": self.nodes.get(node), "Services": services or None}

        return await self._query(request, read)

    async def register(self, request):
        body = await request.json()
        self.nodes[body["Node"]] = {
            "Node": body["Node"],
            "Address": body["Address"],
            "Datacenter": "east",
            "TaggedAddresses": body.get("TaggedAddresses"),
            "Meta": body.get("NodeMeta"),
        }
        if "Service" in body:
            self.services[body["Node"], body["Service"]["ID"]] = body["Service"]
        self.index += 1
        await self._ring()
        return self._json(True)

    async def deregister(self, request):
        body = await request.json()
        self.services.pop((body["Node"], body.get("ServiceID")), None)
        self.index += 1
        await self._ring()
        return self._json(True)

    async def roots(self, request):
        root = {"ID": "aa:bb", "RootCert": self.ca.roots_pem if self.ca else "", "Active": True}
        return await self._query(
            request,
            lambda: {"ActiveRootID": "aa:bb", "TrustDomain": "east.consul", "Roots": [root]},
        )

    async def leaf(self, request):
        service = request.match_info["service"]
        uri = f"spiffe://east.consul/ns/default/dc/east/svc/{service}"
        leaf = self.ca.issue(uri, 3600)
        return self._json(
            {
                "SerialNumber": "1f:91",
                "CertPEM": leaf.certificate_pem,
                "PrivateKeyPEM": leaf.key_pem,
                "Service": service,
                "ServiceURI": uri,
                "ValidAfter": "2026-05-21T16:33:28Z",
                "ValidBefore": "2026-05-24T16:33:28Z",
                "CreateIndex": 5,
                "ModifyIndex": 5,
            }
        )
