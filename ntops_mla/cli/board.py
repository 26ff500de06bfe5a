"""What the subcommands for a board begin with: the device that is meant."""

from __future__ import annotations

from ntops_mla import platform as platforms


def chosen_device(platform: str | None) -> platforms.Detection:
    """The device of a platform, else the best one here.

    DeviceNotFoundError where there is none, or none that a platform file recognises; ValueError where the platform's
    device is made another platform's.
    """
    device = platforms.find_device(platform) if platform else platforms.best_device().device
    detection = platforms.detect(device)
    if detection.platform is None:
        raise platforms.DeviceNotFoundError(f"{device}: {detection.reason}")
    if platform and detection.platform.name != platform:
        raise ValueError(f"argument --platform: {device} is {detection.platform.name} ({detection.reason})")
    return detection
