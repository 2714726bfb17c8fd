//! A learning switch (IEEE 802.1Q) for guests that are in other processes, and for interfaces of the host's.
//!
//! ```text
//!  guest --vhost-user--\                                              /--vhost-user-- guest
//!  guest --vhost-user---[server: one thread, sleeps when idle]--------/--tap--------- host
//!  yado switch ... --- control socket --- [forward: ports, table, guards, queues]
//! ```
//!
//! [`Switch`] is the forwarding core: a value, without clock or thread. [`server`] is the process around it. Guests are hostile, and
//! so are the processes that they are in: the worst that one can do is to lose its own frames.

pub mod capture;
pub mod control;
mod emulation;
mod fill;
mod flood;
mod forward;
mod fuzz;
mod guard;
mod limit;
mod meter;
mod options;
mod packet;
mod port;
mod queue;
mod reason;
pub mod server;
mod share;
mod snoop;
mod table;
#[cfg(test)]
mod test;
mod uplink;
mod vlan;
mod wait;
mod watchdog;

pub use emulation::Emulation;
pub use forward::{PORTS_MAX, Switch};
#[doc(hidden)]
pub use fuzz::{fuzz_switch, fuzz_vhost};
pub use limit::Limit;
pub use options::{GROUP_OPTIONS, OPTIONS as PORT_OPTIONS};
pub use port::{Link, Mac, Port, PortSpec};
pub use reason::{NAMES as DROP_REASONS, Reason};
pub use share::{GROUPS_MAX, GroupSpec, ShareSpec, WEIGHT_MAX};
pub use table::{ADDRESSES_MAX, AGEING_SECONDS, Entry, Key, PortNumber};
pub use vlan::{VLAN_DEFAULT, VLAN_MAX, VlanSet, Vlans, vlan};
