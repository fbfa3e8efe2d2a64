"""`moe-ray doctor` about tokens and certificates: real ones, made wrong in every way."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import TlsSection, load_config
from moe_ray.doctor import credentials
from moe_ray.doctor.finding import Finding, Subject

x509 = pytest.importorskip("cryptography.x509")


def subject(flags: dict[str, Any] | None = None, **environ: str) -> Subject:
    return Subject(load_config(flags), None, environ, 8000, "auto", False, lambda config, directory: 0)


def only(found: Sequence[Finding], check: str) -> Finding:
    (finding,) = (each for each in found if each.check == check)
    assert bool(finding.mend) == (finding.level != "ok")
    return finding


def make_pair(folder: Path, days: tuple[float, float] = (-1, 365)) -> TlsSection:
    """An authority, and a certificate of it that is valid from and to so many days from now."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "peer")}
    folder.mkdir()
    for name, key in keys.items():
        start, end = (-2, 3650) if name == "ca" else days
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=start))
            .not_valid_after(now + datetime.timedelta(days=end))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .sign(keys["ca"], hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoded = keys["peer"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key_file = folder / "key.pem"
    key_file.write_bytes(encoded)
    key_file.chmod(0o600)
    return TlsSection(certificate=str(folder / "peer.pem"), key=str(key_file), ca=str(folder / "ca.pem"))


def tls(section: TlsSection) -> Finding:
    return only(credentials.check_tls(credentials.tls_facts(section), time.time()), "tls")


def test_certificates(tmp_path: Path) -> None:
    good, other = make_pair(tmp_path / "good"), make_pair(tmp_path / "other")
    assert tls(good).level == "ok"
    assert "365 days" in tls(good).says or "364 days" in tls(good).says
    for wrong, says in [
        (good.model_copy(update={"ca": other.ca}), "do not make a connection"),
        (good.model_copy(update={"key": other.key}), "KEY_VALUES_MISMATCH"),
        (good.model_copy(update={"ca": good.key}), "do not make a connection"),
        (good.model_copy(update={"key": str(tmp_path / "none")}), "cannot be read: tls.key"),
        (make_pair(tmp_path / "old", (-2, -1)), "certificate has expired"),
        (make_pair(tmp_path / "early", (1, 2)), "certificate is not yet valid"),
    ]:
        finding = tls(wrong)
        assert finding.level == "error"
        assert says in finding.says
    soon = tls(make_pair(tmp_path / "soon", (-1, 3)))
    assert soon.level == "warning"
    assert "days more" in soon.says
    Path(good.key).chmod(0o644)
    assert "can be read by others" in tls(good).says


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory on whose way no other one is closed to others, as pytest's are."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert only(credentials.examine_credentials(subject()), "tokens").says == "Ray's is made when a server starts"
    short = credentials.examine_credentials(subject({"cluster_token": "hunter2"}))
    assert only(short, "tokens").level == "warning"
    assert "hunter2" not in str(short)
    finding = only(credentials.examine_credentials(subject(RAY_AUTH_TOKEN_PATH="/no/such")), "tokens")
    assert (finding.level, finding.says) == ("error", "RAY_AUTH_TOKEN_PATH names /no/such, which is no file")
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("planted-ray-token")
    file.chmod(0o644)
    finding = only(credentials.examine_credentials(subject()), "tokens")
    assert (finding.level, finding.mend) == ("warning", f"chmod 600 {file}")
    tmp_path.chmod(0o700)
    assert only(credentials.examine_credentials(subject()), "tokens").level == "ok", "nobody else gets there"
    tmp_path.chmod(0o755)
    file.chmod(0o600)
    assert only(credentials.examine_credentials(subject()), "tokens").level == "ok"
