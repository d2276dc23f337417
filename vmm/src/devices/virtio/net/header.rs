//! The header before each packet, `struct virtio_net_hdr` (virtio 1.3 s5.1.6).
//!
//! The one of a packet to be received comes from the host's kernel, whose word is good. The one of a packet to be sent is the guest's, and goes
//! to the host's kernel; what the driver has not negotiated or what cannot be is not passed on.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Its length in bytes.
pub(super) const LENGTH: usize = 12;
/// Where in it the number of buffers is.
pub(super) const NUM_BUFFERS: usize = 10;
/// The length of an Ethernet header: no frame is shorter, and no checksum begins within.
pub(super) const ETHERNET: usize = 14;
/// The longest frame: that of virtio 1.3 s5.1.6.3.1, and two VLAN tags.
pub(super) const MAX_FRAME: usize = 65_550 + 8;

/// The header of a frame of `frame` bytes as the host's kernel is to see it, from that of the driver, which has accepted `features`.
/// `None` if this cannot be a packet.
pub(super) fn to_host(driver: [u8; LENGTH], frame: usize, features: u64) -> Option<[u8; LENGTH]> {
    if !(ETHERNET..=MAX_FRAME).contains(&frame) {
        return None;
    }
    let accepted = |feature: u32| features & 1 << feature != 0;
    let word = |at: usize| usize::from(u16::from_le_bytes([driver[at], driver[at + 1]]));
    let (hdr_len, gso_size, csum_start, csum_offset) = (word(2), word(4), word(6), word(8));

    let mut host = [0; LENGTH];
    // s5.1.6.2.2: flags that mean nothing to the device are ignored.
    let needs_csum = u32::from(driver[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if needs_csum {
        // The checksum is of two bytes.
        let inside = csum_start >= ETHERNET && csum_start + csum_offset + 2 <= frame;
        if !accepted(VIRTIO_NET_F_CSUM) || !inside {
            return None;
        }
        host[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        host[6..10].copy_from_slice(&driver[6..10]);
    }
    let gso_type = u32::from(driver[1]);
    if gso_type != VIRTIO_NET_HDR_GSO_NONE {
        let feature = match gso_type & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_HDR_GSO_UDP_L4 => VIRTIO_NET_F_HOST_USO,
            _ => return None,
        };
        let ecn = gso_type & VIRTIO_NET_HDR_GSO_ECN != 0;
        // s5.1.6.2.1: who wants a packet cut up wants checksums too, and says into pieces of what size.
        if !accepted(feature) || ecn && !accepted(VIRTIO_NET_F_HOST_ECN) || !needs_csum || gso_size == 0 {
            return None;
        }
        host[1] = driver[1];
        host[4..6].copy_from_slice(&driver[4..6]);
    }
    // s5.1.6.2.2: a hint of how much of the frame is headers, not to be relied on.
    host[2..4].copy_from_slice(&(hdr_len.min(frame) as u16).to_le_bytes());
    Some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
    const EVERYTHING: u64 = u64::MAX;

    fn header(flags: u8, gso: u8, hdr_len: u16, size: u16, start: u16, offset: u16) -> [u8; LENGTH] {
        let mut bytes = vec![flags, gso];
        for word in [hdr_len, size, start, offset, 0xffff] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.try_into().unwrap()
    }

    #[test]
    fn what_is_negotiated_passes_and_nothing_else() {
        let segmented = header(1, TCP4 | ECN, 54, 1448, 34, 16);
        let passed = to_host(segmented, 60_000, EVERYTHING).unwrap();
        assert_eq!(passed[..NUM_BUFFERS], segmented[..NUM_BUFFERS]);
        assert_eq!(passed[NUM_BUFFERS..], [0, 0]);
        for missing in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_ECN] {
            assert_eq!(to_host(segmented, 60_000, EVERYTHING & !(1 << missing)), None);
        }
        assert_eq!(to_host(header(0, 0, 0, 0, 0, 0), 60, 0), Some([0; LENGTH]));
    }

    #[test]
    fn what_the_device_does_not_need_is_not_passed_on() {
        // Flags a driver may not set, a segment size and a place for a checksum that nobody asked for.
        assert_eq!(to_host(header(0xfe, 0, 0, 9000, 60_000, 60_000), 60, EVERYTHING), Some([0; LENGTH]));
        assert_eq!(to_host(header(0, 0, 0xffff, 0, 0, 0), 60, 0).unwrap()[2..4], [60, 0]);
    }

    #[test]
    fn packets_that_cannot_be_are_refused() {
        let plain = header(0, 0, 0, 0, 0, 0);
        for frame in [0, 13, MAX_FRAME + 1, usize::MAX] {
            assert_eq!(to_host(plain, frame, EVERYTHING), None, "{frame}");
        }
        for (header, why) in [
            (header(1, 0, 0, 0, 13, 16), "checksum begins in the Ethernet header"),
            (header(1, 0, 0, 0, 34, 25), "checksum ends beyond the frame"),
            (header(1, 0, 0, 0, 0xffff, 0xffff), "checksum far beyond the frame"),
            (header(0, TCP4, 54, 1448, 34, 16), "segments without checksums"),
            (header(1, TCP4, 54, 0, 34, 16), "segments of no size"),
            (header(1, 3, 54, 1448, 34, 6), "fragments, which were not offered"),
            (header(1, ECN, 54, 1448, 34, 16), "ECN of nothing"),
            (header(1, 0x7f, 54, 1448, 34, 16), "unknown kind of segments"),
        ] {
            assert_eq!(to_host(header, 60, EVERYTHING), None, "{why}");
        }
    }
}
