"""Ed25519 signatures under the ledger's digests.

Owns how keys are read, what a key is called (`key_id`: SHA-256 of its public half in DER, as `openssl pkey -pubout
-outform DER | sha256sum` prints it) and how a signature is checked. Does not know where keys lie or what is signed.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

MAKE_ONE = "make one with: openssl genpkey -algorithm ed25519"
_END = "-----END PUBLIC KEY-----"


class KeyInvalid(ValueError):
    """What was given is no key of the kind that is needed; the message is a sentence without its end."""


class SigningKey:
    """The private key of this installation, and what its public half is called."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_der = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.key_id = key_id_of(self.public_der)

    def sign(self, data: bytes) -> str:
        """The signature in hex, 128 digits."""
        return self._private.sign(data).hex()


def signing_key(pem: bytes) -> SigningKey:
    """Read a private key. Raises KeyInvalid."""
    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyInvalid(f"it is no private key in PEM without a password ({error!s:.200}); {MAKE_ONE}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise KeyInvalid(f"it is a private key of another kind; {MAKE_ONE}")
    return SigningKey(private)


def public_keys(pem: str) -> dict[str, bytes]:
    """The public keys of a PEM file that may hold several, in DER by key id. Raises KeyInvalid."""
    found = {}
    blocks = pem.split(_END)
    for block in blocks[:-1]:
        try:
            public = load_pem_public_key((block.strip() + f"\n{_END}\n").encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyInvalid(f"it holds a public key that cannot be read ({error!s:.200})") from None
        if not isinstance(public, Ed25519PublicKey):
            raise KeyInvalid("it holds a public key that is not an Ed25519 one")
        der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        found[key_id_of(der)] = der
    if not found:
        raise KeyInvalid("it holds no public key in PEM; `gpumeter digests keys` prints those of a ledger")
    return found


def public_pem(der: bytes) -> str:
    """A public key as openssl reads it."""
    public = load_der_public_key(der)
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_id_of(der: bytes) -> str:
    """SHA-256 of the public key in DER."""
    return sha256(der).hexdigest()


class Keyring:
    """Public keys by which signatures are judged."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys: dict[str, Ed25519PublicKey] = {}
        for der in keys.values():
            try:
                public = load_der_public_key(der)
            except (ValueError, UnsupportedAlgorithm):
                continue  # a key that cannot be read verifies nothing
            if isinstance(public, Ed25519PublicKey):
                self._keys[key_id_of(der)] = public  # by what it is, whatever it was filed under

    def knows(self, key_id: str) -> bool:
        """Whether there is such a key."""
        return key_id in self._keys

    def verifies(self, key_id: str, signature: str, data: bytes) -> bool:
        """Whether this is the signature of a known key under these bytes."""
        try:
            self._keys[key_id].verify(bytes.fromhex(signature), data)
        except (KeyError, ValueError, InvalidSignature):
            return False
        return True


def merged(rings: Iterable[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Several sets of keys as one."""
    return {key_id: der for ring in rings for key_id, der in ring.items()}
