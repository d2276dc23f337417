//! What a link has counted.

use crate::devices::virtio::counter::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Written by the threads of the device, read by whoever wants to know.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $($(#[$doc])* pub(super) $name: Counter),* }

        impl Counters {
            /// All of them, by name.
            pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get())),*]
            }
        }
    };
}

counters! {
    /// Packets the guest has received.
    rx_packets,
    /// Their length, Ethernet headers included.
    rx_bytes,
    /// Packets for the guest that were longer than the link allows.
    rx_dropped,
    /// How often the guest had no buffers left to receive into.
    rx_starved,
    /// How often the limit held packets for the guest back.
    rx_throttled,
    /// Packets the guest has sent.
    tx_packets,
    /// Their length, Ethernet headers included.
    tx_bytes,
    /// Packets of the guest that the host did not take.
    tx_dropped,
    /// What the guest sent that is no packet.
    tx_malformed,
    /// How often the limit held the guest's packets back.
    tx_throttled,
    /// Commands the device has carried out.
    control_done,
    /// Commands it has refused.
    control_refused,
}
