"""The tests of the trial again, on the emulated Cortex-M, and the power cut at every flash operation there.

A write is torn at one place: a byte takes the emulator 20 to 50 us. More of them are tried in test_firmware_trial.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from board import Board
from emulated import EmulatedCore, the_core  # noqa: F401
from test_firmware_trial import (  # noqa: F401
    board,
    cut_everywhere,
    first,
    test_a_failed_inference_goes_back,
    test_a_failed_inference_of_a_confirmed_model_does_not,
    test_a_late_word_about_another_model_decides_nothing,
    test_a_new_model_runs_in_trial_and_the_former_one_is_kept,
    test_any_reset_before_it_is_confirmed_goes_back,
    test_confirmed_for_good,
    test_confirming_is_done_once_however_often_it_is_asked,
    test_nothing_else_is_taken_during_a_trial,
    test_rolled_back_by_request_once_however_often_it_is_asked,
    test_the_first_model_goes_by_request_and_when_it_fails,
    test_the_first_model_goes_when_it_crashed_the_board,
    test_the_first_model_is_kept_where_nothing_speaks_against_it,
    test_the_same_model_under_another_counter,
    test_time_runs_out,
    update_and_confirm,
    update_and_reset,
    used_board,
)


@pytest.mark.parametrize(("life", "torn"), [(update_and_confirm, 1.0), (update_and_reset, 0.5)])
def test_power_cut_at_every_flash_operation_on_the_core(
    the_core: EmulatedCore,  # noqa: F811
    life: Callable[[Board], None],
    torn: float,
) -> None:
    used_board().close()
    the_core.keep()

    def begin() -> Board:
        used = Board()
        the_core.restore()
        used.boot()
        return used

    cut_everywhere(life, torn, begin)
