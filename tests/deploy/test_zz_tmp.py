import time, httpx, ray


def test_x(served_demo):
    body = {"prompt": [5] * 40, "max_tokens": 4}
    httpx.post(f"{served_demo.url}/v1/completions", json=body, timeout=60, trust_env=False)
    time.sleep(16)
    t0 = time.time()
    text = httpx.get(
        f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=60, trust_env=False
    ).text
    open("/tmp/exposition.txt", "w").write(text + f"\n# took {time.time() - t0}")
