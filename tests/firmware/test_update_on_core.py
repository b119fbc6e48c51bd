"""The tests of the model store again, on the emulated Cortex-M: the same functions, another `Core`.

Left out is what looks into the flash's memory, gives a verifier or has a flash of another size; power cuts are tried in
test_trial_on_core.py.
"""

from __future__ import annotations

from emulated import the_core  # noqa: F401
from test_firmware_update import (  # noqa: F401
    board,
    test_a_transfer_resumes_after_a_reset,
    test_abort_and_query_without_a_transfer,
    test_an_image_in_one_chunk_may_have_any_length,
    test_an_update_changes_the_model_and_keeps_the_old_one,
    test_another_image_begins_anew,
    test_chunk_sizes_that_cannot_be_stored,
    test_chunks_in_any_order_and_more_than_once,
    test_chunks_of_the_wrong_length,
    test_chunks_off_the_grid,
    test_downgrade,
    test_engine_that_refuses,
    test_selftest,
    test_selftest_of_the_wrong_length,
    test_status_tells_what_is_missing,
    test_the_directory_outlives_many_updates,
    test_truncated_model,
    test_what_begin_refuses,
    test_wrong_image_digest,
    test_wrong_model_digest,
)
