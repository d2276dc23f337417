//! The devices of the machine.
//!
//! * [`legacy`] - the few devices of a PC that a guest without firmware still needs.
//! * [`virtio`] - virtio devices, and the transport that puts them on the bus.

pub mod legacy;
pub mod virtio;
