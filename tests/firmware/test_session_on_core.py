"""The tests of the session again, on the emulated Cortex-M: the same functions, another `Core`."""

from __future__ import annotations

from emulated import the_core  # noqa: F401
from test_firmware_session import (  # noqa: F401
    bare,
    board,
    test_a_fragment_of_another_message_replaces,
    test_a_frame_that_a_reset_cut_short_does_not_take_hello_with_it,
    test_a_full_window_still_reassembles,
    test_a_lost_fragment_is_told_once_and_the_retry_succeeds,
    test_a_retry_after_a_lost_last_fragment_begins_anew,
    test_a_retry_is_answered_from_the_store_and_runs_once,
    test_a_retry_that_is_no_longer_remembered_runs_as_if_new,
    test_an_expired_budget_is_not_computed,
    test_announces_itself_after_a_reset,
    test_bodies_of_a_later_minor_version,
    test_bodies_that_are_too_short,
    test_busy_is_not_remembered,
    test_cancel,
    test_cancel_of_a_half_received_message,
    test_fragments,
    test_fragments_that_lie,
    test_frames_stay_small_until_the_gateway_says_what_it_takes,
    test_hello_req_does_not_disturb_open_requests,
    test_infer_errors,
    test_infer_runs_the_active_model,
    test_no_model_and_no_engine,
    test_ping_tells_both_times_and_returns_the_bytes,
    test_reset_is_asked_of_the_board_and_silences_the_session,
    test_stats_count_what_the_line_did,
    test_the_window_is_what_hello_says_and_one_more_is_busy,
    test_unknown_types,
    test_version_mismatch_serves_only_the_way_back,
)
