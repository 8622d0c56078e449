import json, sqlite3, sys
from collections import defaultdict
from datetime import UTC, datetime
from fractions import Fraction
from hashlib import sha256
from itertools import product

ledger = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
wrong, heads, class_of = [], {}, dict(ledger.execute("SELECT worker_uid, gpu_class FROM workers"))
devices_of = dict(ledger.execute("SELECT worker_uid, devices FROM workers"))
model_of = dict(ledger.execute("SELECT worker_uid, model FROM workers"))
accounts, allocated = (defaultdict(lambda: defaultdict(int)) for _ in range(2))
booked = defaultdict(lambda: defaultdict(lambda: [0] * 5))  # ns, prompt, cached and answer tokens, idle ns
hashes = defaultdict(lambda: defaultdict(str))

# Retention removes old records by whole days and keeps a fact of what went, and so do gaps: chains go on from there.
removed, removed_until = defaultdict(list), defaultdict(int)
at_gaps, beside_gaps = set(), set()  # the records on both sides of each gap, and the pods and periods that they are of
for worker, boot, first, last in ledger.execute("SELECT worker_uid, boot_id, first_seq, last_seq FROM gaps"):
    at_gaps |= {(worker, boot, first - 1), (worker, boot, last + 1)}
query = """SELECT worker_uid, boot_id, first_seq, last_seq, last_hash, service, last_end_ns FROM removals UNION ALL
           SELECT worker_uid, boot_id, first_seq, last_seq, last_hash, '', 0 FROM gaps ORDER BY first_seq"""
for worker, boot, first, last, last_hash, service, end in ledger.execute(query):
    removed[worker, boot].append((first, last, last_hash))
    removed_until[service] = max(removed_until[service], end)


def head(chain):
    """Where a chain stands, with what was removed behind it."""
    last_seq, last_hash = heads.get(chain, (0, "0" * 64))
    for first, last, removed_hash in removed[chain]:
        if first == last_seq + 1:
            last_seq, last_hash = last, removed_hash
    return last_seq, last_hash


# 1. Every chain from its first byte that is kept, and the sums of the raw records.
query = "SELECT worker_uid, boot_id, seq, hash, body, booked_end_ns FROM records ORDER BY worker_uid, boot_id, seq"
for worker, boot, seq, given, body, end in ledger.execute(query):
    last_seq, last_hash = head((worker, boot))
    if seq != last_seq + 1 or sha256(last_hash.encode() + body).hexdigest() != given:
        wrong.append(f"{worker} {boot} {seq}: the chain breaks here")
    heads[worker, boot] = seq, given
    if (worker, boot, seq) in at_gaps:
        beside_gaps.add((worker, end))
    record = json.loads(body)
    service, tenant = record["service"], record["tenant"] or "_platform"
    hashes[service, end][tenant] += given
    if record["kind"] == "session" and record["account"] == "attributed":
        accounts[worker, end]["slices"] += record["gpu_ns"]
        piece = booked[service, end][-(-record["ended_at"] // (60 * 10**9)) * 60 * 10**9, worker, tenant]
        for index, name in enumerate(("gpu_ns", "prompt_tokens", "cached_tokens", "completion_tokens")):
            piece[index] += record[name]
    elif record["kind"] == "account":
        accounts[worker, end][record["account"]] += record["gpu_ns"]
        if record["account"] in ("idle", "host_gap"):
            minute = -(-record["ended_at"] // (60 * 10**9)) * 60 * 10**9
            booked[service, end][minute, worker, "_platform"][4] += record["gpu_ns"]

query = "SELECT worker_uid, boot_id, committed_seq, head_hash FROM boots"
cursors = {(worker, boot): (seq, head) for worker, boot, seq, head in ledger.execute(query)}
for worker, boot in heads.keys() | cursors.keys() | removed.keys():
    if head((worker, boot)) != cursors.get((worker, boot), (0, "0" * 64)):
        wrong.append(f"{worker} {boot}: the chain does not end where the collector left it")

# 2. The identity of every pod and closed period, and all of a pod's allocation against its containers.
closed, of_pod, frozen = defaultdict(int), defaultdict(int), defaultdict(dict)
query = """SELECT namespace || '/' || service, pod, worker_uid, period_end_ns, allocated, init, load, warmup, attributed,
           nonbillable, idle, drain, unaccounted FROM pod_accounts JOIN workers USING (worker_uid)"""
for service, pod, worker, end, given, init, load, warmup, attributed, nonbillable, idle, drain, rest in ledger.execute(
    query
):
    raw = accounts[worker, end]
    allocated[service, end][class_of[worker]] += given
    frozen[service, end][worker] = given
    of_pod[worker] += given
    closed[service] = max(closed[service], end)
    if given != init + load + warmup + attributed + nonbillable + idle + drain + rest:
        wrong.append(f"{pod} {end}: the accounts do not add up to {given}")
    if end <= removed_until[service]:
        continue
    # Slices and accounts of one flush may lie on both sides of a gap; the report says that they disagree.
    agree = raw["slices"] == raw["attributed"] or (worker, end) in beside_gaps
    if attributed != raw["slices"] or not agree:
        wrong.append(
            f"{pod} {end}: attributed is {attributed}, sessions say {raw['slices']}, the pod {raw['attributed']}"
        )
    if (init, load, warmup, nonbillable) != tuple(raw[name] for name in ("init", "load", "warmup", "nonbillable")):
        wrong.append(f"{pod} {end}: start or nonbillable work is not what its records say")
    if idle != raw["idle"] + raw["host_gap"] or drain < raw["drain"]:  # after its seal a pod drains without records
        wrong.append(f"{pod} {end}: idle or drain is not what its records say")

reports = defaultdict(dict)
query = "SELECT namespace || '/' || service, period_end_ns, tenant, body, digest FROM reports WHERE phase = 'Final'"
for service, end, tenant, body, digest in ledger.execute(query):
    reports[service, end][tenant] = json.loads(body)
    closed[service] = max(closed[service], end)
    if sha256(body).hexdigest() != digest:
        wrong.append(f"{service} {end}: the bytes of {tenant}'s report are not those of its digest")

ran, lives = defaultdict(int), defaultdict(list)
query = """SELECT worker_uid, devices, namespace || '/' || service, MAX(CASE event WHEN 'started' THEN at_ns END),
           COALESCE(MAX(CASE event WHEN 'ended' THEN at_ns END), MAX(CASE event WHEN 'vanished' THEN at_ns END))
           FROM containers JOIN workers USING (worker_uid) WHERE container_id != '' GROUP BY worker_uid, container_id"""
for worker, devices, service, started, ended in ledger.execute(query):
    until = closed[service] if ended is None else min(ended, closed[service])
    if started is not None:
        ran[worker] += devices * max(0, until - started)
        lives[service].append((worker, started, ended))
query = "SELECT worker_uid, namespace || '/' || service, booked_end_ns, allocated_ns FROM adjustments"
for worker, service, end, given in ledger.execute(query):
    ran[worker] -= given if end > closed[service] else 0  # became known late, and stands in a period that is open
for worker in ran.keys() | of_pod.keys():
    if ran[worker] != of_pod[worker]:
        wrong.append(f"{worker}: closed periods hold {of_pod[worker]}, its containers ran {ran[worker]} in them")

# 3. The versions of the price plan that hold in each period: the one with which it was opened, then each from the whole
# minute after it was seen. A rate holds for what ends after its effectiveFrom.
MINUTE = 60 * 10**9


def later(at):
    return -(-at // MINUTE) * MINUTE


def since(rate):
    return int(datetime.fromisoformat(rate.get("effectiveFrom", "1970-01-01T00:00:00Z")).timestamp()) * 10**9


specs, seen, plans, opened, terms = {}, defaultdict(list), {}, {}, {}
for name, plan_hash, spec in ledger.execute("SELECT name, hash, spec FROM price_plans"):
    if sha256(spec).hexdigest() == plan_hash:
        specs[name, plan_hash] = json.loads(spec)
query = "SELECT name, hash, observed_ns FROM plan_observations ORDER BY observed_ns, id"
for name, plan_hash, at in ledger.execute(query):
    seen[name].append((at, plan_hash))
query = """SELECT namespace || '/' || service, end_ns, start_ns, opened_ns, plan_name, plan_hash, billing_mode, owner
           FROM periods LEFT JOIN period_terms USING (namespace, service, end_ns)"""
for service, end, start, at, name, plan_hash, mode, owner in ledger.execute(query):
    opened[service, end], terms[service, end] = (start, plan_hash or None), (mode, owner)
    if plan_hash and (name, plan_hash) not in specs:
        wrong.append(f"{service} {end}: the price plan of this period is gone or was changed")
    first = [each for each in seen[name] if each[0] <= start][-1:] or [each for each in seen[name] if each[0] <= at][:1]
    known = max(start, first[0][0]) if first and first[0][1] == plan_hash else at
    newer = {max(start, later(when)): each for when, each in seen[name] if each and known < when < end}
    held = {start: plan_hash} | newer
    plans[service, end] = [(when, specs.get((name, each))) for when, each in sorted(held.items()) if when < end]


def cut(versions, end):
    """The parts of the time from the first version on in which nothing changes, as (start, end, spec)."""
    edges = {end, *(when for when, _ in versions)}
    for (when, spec), until in zip(versions, [each for each, _ in versions[1:]] + [end]):
        rates = (spec or {}).get("rates", []) + (spec or {}).get("standardRates", [])
        edges |= {since(each) for each in rates if when < since(each) < until}
    edges = sorted(edges)
    return [(a, b, [spec for when, spec in versions if when <= a][-1]) for a, b in zip(edges, edges[1:])]


def rate_of(spec, at, kind, key, name):
    found = [each for each in (spec or {}).get(kind, []) if each[key] == name and since(each) <= at]
    return max(found, key=since, default=None)


def of_time(spec, at, gpu_class, ns):
    rate, part = rate_of(spec, at, "rates", "gpuClass", gpu_class), 1
    if rate and "of" in rate:
        rate, part = rate_of(spec, at, "rates", "gpuClass", rate["of"]), Fraction(rate["fraction"])
    return Fraction(0) if not ns else rate and ns * Fraction(rate["perGpuHour"]) * part / Fraction(3600 * 10**9)


def of_tokens(spec, at, model, prompt, cached, answer):
    rate = rate_of(spec, at, "standardRates", "model", model)
    if not rate:
        return None if prompt or answer else Fraction(0)
    paid = Fraction(rate["perThousandPromptTokens"]), Fraction(rate["perThousandCompletionTokens"])
    found = Fraction(rate.get("perThousandCachedTokens", rate["perThousandPromptTokens"]))
    cached = min(prompt, cached)
    return ((prompt - cached) * paid[0] + cached * found + answer * paid[1]) / 1000


# 4. A Final report for everybody who has records in a closed period or pays for idle time, and for the platform: its
# time, digest and amount. What was booked late is priced as in the period to which it would have belonged.
late = defaultdict(list)
query = "SELECT namespace || '/' || service, booked_end_ns, closed_end_ns, worker_uid, allocated_ns FROM adjustments"
for service, end, closed_end, worker, ns in ledger.execute(query):
    late[service, end].append((closed_end, worker, ns))
by_hand = defaultdict(list)  # corrections: to a tenant, and as much the other way to the platform
query = """SELECT namespace || '/' || service, booked_end_ns, COALESCE(part_start_ns, closed_start_ns), tenant,
           gpu_class, gpu_ns, model, prompt_tokens, cached_tokens, completion_tokens FROM corrections"""
for service, end, *each in ledger.execute(query):
    by_hand[service, end].append(each)
known = {*opened, *hashes, *allocated, *reports}
periods = sorted(each for each in known if removed_until[each[0]] < each[1] <= closed[each[0]])
for service, end in periods:
    start, plan_hash = opened.get((service, end), (end, None))
    before = {each for each, _, _ in late[service, end]}
    at_hand = [at for at, *_ in by_hand[service, end]]
    before |= {each for (of, each), (a, _) in opened.items() if of == service and any(a <= at < each for at in at_hand)}
    before = sorted(before & {each for of, each in plans if of == service})
    own = plans.get((service, end), [(start, None)])
    parts = cut([one for each in before for one in plans[service, each]] + own, end)
    of_part = [[each for each in [*before, end] if a >= opened.get((service, each), (end,))[0]] for a, _, _ in parts]
    of_part = [terms.get((service, each[-1]), (None, None)) for each in of_part]

    def part_of(at):
        return next((index for index, (_, until, _) in enumerate(parts) if at <= until), len(parts) - 1)

    given = defaultdict(int)  # allocated, by part and class
    for closed_end, worker, ns in late[service, end]:
        given[part_of(closed_end), class_of[worker]] += ns
    for worker, total in frozen[service, end].items():
        # That a container ended or ran at all may have become known when the period was closed already.
        total -= sum(ns for _, of, ns in late[service, end] if of == worker)
        known = [((a, b or end), (a, end), (0, 0)) for of, a, b in lives[service] if of == worker and a < end]
        for spans in product(*[each for each in known if each[0][1] > start]):
            ran = [
                sum(max(0, min(b, y) - max(a, start, x)) for x, y in spans) * devices_of[worker] for a, b, _ in parts
            ]
            if sum(ran) == total:
                break
        else:
            ran = [total if len(parts) == 1 else 0 for _ in parts]
        for index, ns in enumerate(ran):
            given[index, class_of[worker]] += ns
    shares, idle, due = defaultdict(lambda: defaultdict(int)), defaultdict(int), defaultdict(list)
    billed = defaultdict(int)
    for (at, worker, tenant), (ns, prompt, cached, answer, idle_ns) in booked[service, end].items():
        index = part_of(later(at))
        a, _, spec = parts[index]
        idle[index, class_of[worker]] += idle_ns
        if tenant != "_platform" and (ns or prompt or answer):
            cost = of_time(spec, a, class_of[worker], ns)
            shares[index, class_of[worker]][tenant] += ns
            billed[tenant] += ns
            if of_part[index][0] == "standardRate":
                paid = of_tokens(spec, a, model_of[worker], prompt, cached, answer)
                due["_platform"].append(None if None in (cost, paid) else cost - paid)
                cost = paid
            due[tenant].append(cost)
    for index, gpu_class in {*given, *shares, *idle}:
        (a, b, spec), (mode, owner) = parts[index], of_part[index]
        used_ns, idle_ns, rest = shares[index, gpu_class], idle[index, gpu_class], given[index, gpu_class]
        payer, total, pays = (spec or {}).get("idlePayer", "platform"), sum(used_ns.values()), {}
        if mode != "standardRate" and payer == "owner" and owner:
            pays = {owner: idle_ns}
        elif mode != "standardRate" and payer == "tenant" and total and idle_ns and b > start:
            pays = {tenant: idle_ns * ns // total for tenant, ns in sorted(used_ns.items()) if ns}
            order = sorted(pays, key=lambda each: -(idle_ns * used_ns[each] % total))
            for tenant in order[: idle_ns - sum(pays.values())]:
                pays[tenant] += 1
        for tenant, ns in pays.items():
            billed[tenant] += ns
            due[tenant].append(of_time(spec, a, gpu_class, ns))
        rest -= total + sum(pays.values())
        billed["_platform"] += rest
        due["_platform"].append(of_time(spec, a, gpu_class, rest))
    for part_start, tenant, gpu_class, ns, model, *tokens in by_hand[service, end]:
        a, _, spec = parts[part_of(part_start + 1)]
        cost = of_time(spec, a, gpu_class, ns)
        if model is not None:  # of tokens that standard rates billed: all of them are given back, or all billed
            cost = of_tokens(spec, a, model, *map(abs, tokens))
            cost = cost and (-cost if min(tokens) < 0 else cost)
        for owner, sign in ((tenant, 1), ("_platform", -1)):
            billed[owner] += sign * ns
            due[owner].append(None if cost is None else sign * cost)
    currencies = {spec["currency"] for _, _, spec in parts if spec}
    payers = {tenant for tenant, ns in billed.items() if ns} | {each[1] for each in by_hand[service, end]}
    for tenant in sorted({"_platform", *hashes[service, end], *reports[service, end], *payers}):
        report = reports[service, end].get(tenant)
        if report is None:
            wrong.append(f"{service} {end}: {tenant} has no report")
            continue
        status = report["status"]
        if report["spec"]["tenant"] != tenant or int(status["gpuNanoseconds"]) != billed[tenant]:
            wrong.append(f"{service} {end}: {tenant} is billed {status['gpuNanoseconds']}, not {billed[tenant]}")
        if status["digest"] != sha256(hashes[service, end][tenant].encode()).hexdigest():
            wrong.append(f"{service} {end}: the digest of {tenant}'s report is not that of its records")
        if report["spec"].get("pricePlanHash") != plan_hash:
            wrong.append(f"{service} {end}: {tenant}'s report names another price plan than the period was opened with")
        priced = currencies and None not in due[tenant] and len(currencies) == 1
        total = sum(due[tenant]) if priced else None
        for name in ("amount", "amountDue"):
            stated = status.get(name)
            if len(currencies) <= 1 and (stated is None) != (total is None):
                wrong.append(
                    f"{service} {end}: {name} of {tenant} is {stated}, its time costs {total and float(total)}"
                )
            elif stated and total is not None and abs(Fraction(stated) - total) * 2 * 10**12 > 1:
                wrong.append(f"{service} {end}: {name} of {tenant} is {stated}, its time costs {float(total)}")
        if status.get("currency") and status["currency"] not in currencies:
            known = " and ".join(sorted(currencies))
            wrong.append(f"{service} {end}: {tenant} is billed in {status['currency']}, the plan is in {known}")

print("\n".join(wrong) or f"all right: {len(heads)} chains, {len(periods)} closed periods")
for service, end in closed.items():
    waiting = sum(each[0] == service and each[1] > end for each in hashes)
    print(f"{service}: closed until {datetime.fromtimestamp(end // 10**9, UTC)}, {waiting} later periods with records")
sys.exit(bool(wrong))
