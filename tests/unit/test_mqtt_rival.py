"""When a link says that another client with its id may be connected."""

from agent.link.mqtt import RIVAL_GONE_S, SOON_LOSSES, Rival


def test_a_rival_is_told_from_a_flapping_broker() -> None:
    rival = Rival()
    for at in range(SOON_LOSSES):
        assert not rival.suspected
        rival.lost(100.0 + at, 100.5 + at)
    assert rival.suspected
    rival.lost(200.0, 245.0)  # The other one came back when its own back-off was over.
    assert rival.suspected
    rival.failed()  # No: the broker is down.
    assert not rival.suspected
    for at in range(10):
        rival.lost(300.0 + at, 300.5 + at)
        rival.failed()
    assert not rival.suspected
    for at in range(SOON_LOSSES):
        rival.lost(400.0 + at, 400.5 + at)
    rival.lost(500.0, 501.0 + RIVAL_GONE_S)
    assert not rival.suspected
