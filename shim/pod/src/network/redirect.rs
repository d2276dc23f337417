//! Traffic control that joins two links: what arrives at one leaves by the other, and nobody else on the host sees it (tc-mirred(8)).

use std::io;

use kvrun_netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcOption,
};
use rustix::io::Errno;

/// By which our filters are known, and come after those of others, who may drop packets: "kv".
const PRIORITY: u16 = 0x6b76;
/// `ETH_P_ALL` (Linux include/uapi/linux/if_ether.h).
const EVERY_PROTOCOL: u16 = 3;
/// The queueing discipline that has filters for what arrives.
const QDISC: &str = "ingress";
/// The handle of the ingress queueing discipline, of which a link has at most one.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };

/// Has all that arrives at the link `from` leave by the link `to`. What an earlier machine has left there is replaced.
pub(super) fn make(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    let mut qdisc = message(from);
    qdisc.header.handle = INGRESS;
    qdisc.header.parent = TcHandle::INGRESS;
    qdisc.attributes.push(TcAttribute::Kind(QDISC.to_owned()));
    let made = netlink.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL);
    // One that somebody else has put there serves as well.
    unless(made, &[Errno::EXIST])?;
    remove_filter(netlink, from)?;
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut filter = filter(from);
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    netlink.change(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE | NLM_F_EXCL)
}

/// Undoes [`make`]; whether there was something to undo.
pub(super) fn remove(netlink: &mut Netlink, from: u32) -> io::Result<bool> {
    if !remove_filter(netlink, from)? {
        return Ok(false);
    }
    // The discipline itself goes with its last filter. It may have been there before us, but without filters it has no effect.
    let mut filters = message(from);
    filters.header.parent = INGRESS;
    let left = netlink.list(&RouteNetlinkMessage::GetTrafficFilter(filters));
    if left.is_ok_and(|left| left.is_empty()) {
        let mut qdisc = message(from);
        qdisc.header.handle = INGRESS;
        qdisc.header.parent = TcHandle::INGRESS;
        // `clsact` has the same handle, and filters for the other direction: with this attribute the kernel refuses to take it for ours.
        qdisc.attributes.push(TcAttribute::Kind(QDISC.to_owned()));
        let removed = netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0);
        unless(removed, &[Errno::NOENT, Errno::INVAL, Errno::NODEV])?;
    }
    Ok(true)
}

/// Whether there was one; there is none where there is no link or no discipline.
fn remove_filter(netlink: &mut Netlink, from: u32) -> io::Result<bool> {
    let removed = netlink.change(RouteNetlinkMessage::DelTrafficFilter(filter(from)), 0);
    unless(removed, &[Errno::NOENT, Errno::INVAL, Errno::NODEV])
}

fn message(link: u32) -> TcMessage {
    TcMessage::with_index(link.cast_signed())
}

fn filter(link: u32) -> TcMessage {
    let mut filter = message(link);
    filter.header.parent = INGRESS;
    // Linux net/sched/cls_api.c, `tc_new_tfilter()`: the priority, and the protocol in network byte order.
    filter.header.info = u32::from(PRIORITY) << 16 | u32::from(EVERY_PROTOCOL.to_be());
    filter
}

/// Whether it was done; not if the kernel says why not in one of the expected ways.
fn unless(result: io::Result<()>, expected: &[Errno]) -> io::Result<bool> {
    match result {
        Err(error) if expected.iter().any(|e| error.raw_os_error() == Some(e.raw_os_error())) => Ok(false),
        result => result.map(|()| true),
    }
}
