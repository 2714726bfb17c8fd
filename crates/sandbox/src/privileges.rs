//! Rights that the process has by who it is: it gives them up.
//!
//! Unsafe, because unshare(2) is: it could part a thread from its descriptors. It is never asked to here.
#![allow(unsafe_code)]

use crate::{Error, Plan};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags, capabilities,
    capability_is_in_bounding_set, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_capabilities_secure_bits, set_no_new_privs, unshare_unsafe,
};
use std::fs;
use std::time::Duration;

/// A thread that has been joined may take a moment to be gone.
const LOOKS: u32 = 1000;

/// How many threads this process has, once those that are ending have ended.
pub fn threads_left() -> usize {
    let mut count = 0;
    for _ in 0..LOOKS {
        count = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        if count == 1 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    count
}

fn refused(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |errno| Error::Host { what, source: errno.into() }
}

/// Executed files give no rights (prctl(2), PR_SET_NO_NEW_PRIVS).
pub(crate) fn forbid_new() -> Result<(), Error> {
    set_no_new_privs(true).map_err(refused("no_new_privs"))
}

/// Whether a process without rights may make a user namespace here, as far as that can be known without trying.
fn user_namespaces_allowed() -> bool {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    // Ubuntu's AppArmor lets them be made, but gives no rights in them, not even to say who is who.
    number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").unwrap_or(0) == 0
        && number("/proc/sys/user/max_user_namespaces").unwrap_or(0) != 0
        && number("/proc/sys/kernel/unprivileged_userns_clone").unwrap_or(1) != 0
}

/// Which namespaces a plan is better off in.
fn wanted(plan: &Plan) -> (UnshareFlags, String) {
    let mut flags = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    let mut names = vec!["ipc", "uts"];
    if !plan.internet && !plan.abstract_sockets {
        flags |= UnshareFlags::NEWNET;
        names.push("net");
    }
    (flags, names.join(", "))
}

/// Enters namespaces of its own where the host allows; answers which, or why not.
pub(crate) fn enter_namespaces(plan: &Plan) -> String {
    let (mut flags, mut names) = wanted(plan);
    let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    let own_users = !may;
    if own_users {
        if !user_namespaces_allowed() {
            return "none: this host lets users make none".to_owned();
        }
        flags |= UnshareFlags::NEWUSER;
        names = format!("user, {names}");
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: descriptors are not unshared.
    if let Err(errno) = unsafe { unshare_unsafe(flags) } {
        return format!("none: {}", std::io::Error::from(errno));
    }
    if own_users {
        // Everybody is who he was. Refused, files still have their owners, and nothing is made by path.
        let _ = fs::write("/proc/self/setgroups", "deny");
        let _ = fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"));
        let _ = fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"));
    }
    names
}

/// All that can be, and cannot be undone (capabilities(7)).
const LOCKED: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

/// Gives up all capabilities, and the way to any.
pub(crate) fn drop_capabilities() -> Result<String, Error> {
    let had = capabilities(None).map_err(refused("a look at capabilities"))?;
    if had.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1u64.wrapping_shl(number));
            // The first that the kernel does not know is the end.
            match capability_is_in_bounding_set(one) {
                Err(_) => break,
                Ok(false) => {}
                Ok(true) => {
                    remove_capability_from_bounding_set(one).map_err(refused("a smaller bounding set"))?;
                }
            }
        }
        set_capabilities_secure_bits(LOCKED).map_err(refused("secure bits"))?;
    }
    // Kernels before 4.3 have no such set.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(refused("to take capabilities away"))?;
    Ok("none".to_owned())
}
