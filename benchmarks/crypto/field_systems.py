"""Run one encrypted linear in other systems, each in the way that is fastest in it: concrete-ml-extensions and TenSEAL.

All compute x·Wᵀ for the same int8 weights. `serve` takes objects in memory and gives such objects: reading and writing
the wire's bytes is left out of their server time, in their favour. Their packages come with the `bench` extra.
"""

from __future__ import annotations

import abc
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class System(abc.ABC):
    """Represent a client and a server of an encrypted linear, with one batch: x f32 [T, in], weight int8 [out, in].

    tokens, features: T and (in, out) of the product that is computed. bytes_up, bytes_down: the serialized messages of that
    batch, known once `encrypt` and `decrypt` were called. Call the three in their order; each may be repeated.
    """

    name: str

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.tokens = len(x)
        self.features = (weight.shape[1], weight.shape[0])
        self.bytes_up = self.bytes_down = 0

    @abc.abstractmethod
    def encrypt(self) -> None: ...

    @abc.abstractmethod
    def serve(self) -> None: ...

    @abc.abstractmethod
    def decrypt(self) -> Tensor: ...

    def exact(self) -> Tensor:
        """Return x·Wᵀ in float64 [T, out]."""
        return self.x.double() @ self.weight.double().t()


class ConcreteMl(System):
    """Encrypt by row as GLWE with 2048 features in a polynomial; the result is one keyswitch per output.

    The activations are 8-bit integers, one scale per token. The bits reserved for the result are as many as it needs, as in
    the library's own tests of correctness.
    """

    name = "concrete-ml-extensions"

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        import concrete_ml_extensions

        self._library: Any = concrete_ml_extensions
        super().__init__(x, weight)
        self._scale = x.abs().amax(dim=1, keepdim=True) / 127
        self._integers = (x / self._scale).round().numpy().astype(np.int64)  # [T, in]
        self._matrix = weight.t().contiguous().numpy().astype(np.int64)  # [in, out]
        largest = int(np.abs(self._integers @ self._matrix).max())
        self._bits = math.ceil(math.log2(largest + 1)) + 1
        options = json.loads(self._library.default_params()) | {"bits_reserved_for_computation": self._bits}
        self._degree = options["polynomial_size"]
        self._parameters = self._library.MatmulCryptoParameters.deserialize(json.dumps(options))
        self._secret, self._compression = self._library.create_private_key(self._parameters)
        self.key_bytes = len(self._compression.serialize())

    def encrypt(self) -> None:
        self._sent = self._library.encrypt_matrix(self._secret, self._parameters, self._integers.astype(np.uint64))
        self.bytes_up = len(self._sent.serialize())

    def serve(self) -> None:
        self._reply = self._library.matrix_multiplication(self._sent, self._matrix.astype(np.uint64), self._compression)

    def decrypt(self) -> Tensor:
        self.bytes_down = len(self._reply.serialize())
        valid = self.features[1] % self._degree or self._degree
        words = self._library.decrypt_matrix(
            self._reply, self._secret, self._parameters, num_valid_glwe_values_in_last_ciphertext=valid
        )
        values = words.astype(np.int64) % 2**self._bits
        centred = np.where(values >= 2 ** (self._bits - 1), values - 2**self._bits, values)  # [T, out]
        return torch.from_numpy(centred).double() * self._scale


class TensealTensor(System):
    """Multiply by CKKSTensor's own product: tokens in the slots, one ciphertext per feature, on `thread_count` threads."""

    name = "TenSEAL, CKKSTensor.mm"
    degree, modulus_bits, scale = 8192, (60, 40, 60), 2.0**40

    def __init__(self, x: Tensor, weight: Tensor, thread_count: int) -> None:
        import tenseal

        super().__init__(x[: self.degree // 2], weight)
        self._library: Any = tenseal
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            self.degree,
            coeff_mod_bit_sizes=list(self.modulus_bits),
            n_threads=thread_count,
        )
        self._context.global_scale = self.scale
        self._plain = tenseal.plain_tensor(self.x.flatten().tolist(), [self.tokens, 1, self.features[0]])
        self._matrix = tenseal.plain_tensor(weight.t().double().flatten().tolist(), list(self.features))

    def encrypt(self) -> None:
        self._sent = self._library.ckks_tensor(self._context, self._plain, batch=True)  # [1, in] of ciphertexts
        self.bytes_up = len(self._sent.serialize())

    def serve(self) -> None:
        self._reply = self._sent.mm(self._matrix)

    def decrypt(self) -> Tensor:
        self.bytes_down = len(self._reply.serialize())
        values = torch.tensor(self._reply.decrypt().tolist(), dtype=torch.float64)  # [T, 1, out]
        return values.view(self.tokens, self.features[1])


class TensealScalars(System):
    """Multiply by hand through TenSEAL's bindings of SEAL: one multiply_plain by a scalar and one add per weight.

    Over a single 50-bit prime, without any rescaling, on one thread: the least work that CKKS can do here.
    """

    name = "TenSEAL, SEAL calls by hand"
    degree, modulus_bits, scale = 8192, (50, 50), 2.0**24

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        import tenseal.sealapi as seal

        self._seal: Any = seal
        super().__init__(x[: self.degree // 2], weight)
        options = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        options.set_poly_modulus_degree(self.degree)
        options.set_coeff_modulus(seal.CoeffModulus.Create(self.degree, list(self.modulus_bits)))
        context = seal.SEALContext(options, True, seal.SEC_LEVEL_TYPE.TC128)
        generator = seal.KeyGenerator(context)
        self._encryptor = seal.Encryptor(context, generator.secret_key())
        self._decryptor = seal.Decryptor(context, generator.secret_key())
        self._evaluator, self._encoder = seal.Evaluator(context), seal.CKKSEncoder(context)
        self._columns = [column.tolist() for column in self.x.double().t()]  # in × [T]
        self._rows = [row.double().tolist() for row in weight]  # out × [in]

    def encrypt(self) -> None:
        self._sent = []
        for column in self._columns:
            plain, ciphertext = self._seal.Plaintext(), self._seal.Ciphertext()
            self._encoder.encode(column, self.scale, plain)
            self._encryptor.encrypt_symmetric(plain, ciphertext)
            self._sent.append(ciphertext)
        self.bytes_up = sum(self._wire_bytes(ciphertext) for ciphertext in self._sent)

    def serve(self) -> None:
        self._reply = []
        for row in self._rows:
            total = None
            for ciphertext, weight in zip(self._sent, row, strict=True):
                if weight == 0.0:
                    continue  # SEAL refuses to multiply by zero
                plain, term = self._seal.Plaintext(), self._seal.Ciphertext()
                self._encoder.encode(weight, 1.0, plain)
                self._evaluator.multiply_plain(ciphertext, plain, term)
                if total is None:
                    total = term
                else:
                    self._evaluator.add_inplace(total, term)
            self._reply.append(total)

    def decrypt(self) -> Tensor:
        self.bytes_down = sum(self._wire_bytes(ciphertext) for ciphertext in self._reply)
        outputs = []
        for ciphertext in self._reply:
            plain = self._seal.Plaintext()
            self._decryptor.decrypt(ciphertext, plain)
            outputs.append(torch.tensor(self._encoder.decode_double(plain), dtype=torch.float64))
        return torch.stack(outputs, dim=1)  # [T, out]

    def _wire_bytes(self, ciphertext: Any) -> int:
        return ciphertext.size() * self.degree * math.ceil(self.modulus_bits[0] / 8)
