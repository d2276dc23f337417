//! The devices of the machine.
//!
//! * [`virtio`] - virtio devices, and the transport that puts them on the bus.

pub mod virtio;
