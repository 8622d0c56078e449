"""What the gateway makes of its mirrors: alive as long as each of them is fed."""

import asyncio

import aiohttp

from rigs.gateway import gateway_rig


async def test_a_mirror_that_is_stuck_is_a_reason_to_restart_and_is_named() -> None:
    async with asyncio.timeout(30), gateway_rig() as rig, aiohttp.ClientSession(rig.url) as http:
        async with http.get("/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        rig.cluster.slices.stuck = "Nothing was heard about endpointslices for 301 s."
        async with http.get("/healthz") as answer:
            assert (answer.status, await answer.text()) == (503, "Nothing was heard about endpointslices for 301 s.\n")
