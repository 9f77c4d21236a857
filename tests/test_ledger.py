# SPDX-License-Identifier: Apache-2.0
from vllm_nanoquant.ledger import Ledger


def test_the_last_module_completes_the_ledger_once():
    ledger = Ledger("preset full, group size 64, minmax")
    for name in ("a", "b"):
        ledger.expect(name)
    assert not ledger.finish("a", 2_000_000, 500_000)
    assert ledger.finish("b", 1_000_000, 250_000)
    assert not ledger.finish("b", 1_000_000, 250_000), "a reload counts nothing twice"
    assert ledger.summary() == (
        "quantized 2 modules to int4 (preset full, group size 64, minmax): 3.00 MB to 0.75 MB"
    )


def test_weights_that_were_int4_already_are_not_called_quantized():
    ledger = Ledger("preset ssm, group size 128, minmax", stored=True)
    ledger.expect("a")
    assert ledger.finish("a", 2_000_000, 500_000)
    assert ledger.summary() == (
        "loaded 1 int4 modules (preset ssm, group size 128, minmax): 0.50 MB, 2.00 MB in BF16"
    )
