//! System calls: what there is for whom.
//!
//! The process has one list, the union of what its threads do, and each kind of thread a shorter one on top. Calls without
//! a condition cost nothing (the kernel knows them by a bitmap); those with one cost a few dozen instructions of BPF.
//!
//! Three programs make up the process's filter, of which the strictest answer counts: the list (else EPERM), what no guest
//! ever needs (ends the process), and one call that must look as if the kernel did not have it: clone3(2) keeps its flags in
//! memory, where no filter sees them, and the C library falls back to clone(2).

use crate::{Error, Plan};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;
use std::io;

/// Kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU and the devices that it touches.
    Vcpu,
    /// Moves a disk's bytes.
    Disk,
    /// Moves a network card's frames.
    Network,
    /// Waits for timers.
    Timer,
    /// Carries bytes of a console or of the agent.
    Port,
    /// Answers those who ask about the guest.
    Control,
}

impl Role {
    const ALL: [Self; 6] = [Self::Vcpu, Self::Disk, Self::Network, Self::Timer, Self::Port, Self::Control];
}

/// A call, and what must hold of its arguments.
#[derive(Debug, Clone, Copy)]
struct Call {
    number: i64,
    when: &'static [When],
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy)]
enum When {
    /// It is this.
    Is(u8, u64),
    /// Of these bits it has those.
    Bits(u8, u64, u64),
    /// It is this process's id.
    Own(u8),
    /// It is one process's id: not a group of them, and not all.
    One(u8),
}

const fn call(number: libc::c_long) -> Call {
    Call { number, when: &[] }
}

const fn when(number: libc::c_long, when: &'static [When]) -> Call {
    Call { number, when }
}

macro_rules! calls {
    ($($name:ident)*) => { &[$(call(libc::$name)),*] };
}

/// Every thread: compute, wait, use what it has, end.
const EVERYBODY: &[Call] = calls! {
    SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_lseek SYS_close SYS_fstat SYS_dup
    SYS_poll SYS_ppoll SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2 SYS_epoll_ctl SYS_epoll_create1 SYS_eventfd2
    SYS_timerfd_create SYS_timerfd_settime SYS_pipe2
    SYS_munmap SYS_mremap SYS_madvise SYS_brk
    SYS_futex SYS_sched_yield SYS_membarrier SYS_getcpu SYS_sched_getaffinity SYS_restart_syscall
    SYS_nanosleep SYS_clock_nanosleep SYS_clock_gettime SYS_clock_getres SYS_gettimeofday SYS_time
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack
    SYS_getpid SYS_gettid SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_uname SYS_getrusage SYS_getrandom
    SYS_set_robust_list SYS_rseq SYS_exit SYS_exit_group
    // A signal's handler writes to a socket of its own.
    SYS_sendto SYS_recvfrom
    // Of a descriptor: whoever is given a path here looks at no more than who owns it.
    SYS_statx SYS_newfstatat
    // Guest RAM is given back to the host.
    SYS_fallocate
};

const EXEC: u64 = libc::PROT_EXEC as u64;

/// The same, by their arguments.
const EVERYBODY_WHEN: &[Call] = &[
    when(libc::SYS_mmap, &[When::Bits(2, EXEC, 0)]),
    when(libc::SYS_mprotect, &[When::Bits(2, EXEC, 0)]),
    when(libc::SYS_tgkill, &[When::Own(0)]),
    when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_NAME as u64)]),
    when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_TIMERSLACK as u64)]),
    // Names of mappings, which the C library gives.
    when(libc::SYS_prctl, &[When::Is(0, 0x5356_4d41)]),
    // A thread puts on what its kind wears.
    when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_NO_NEW_PRIVS as u64)]),
    when(libc::SYS_seccomp, &[When::Is(0, libc::SECCOMP_SET_MODE_FILTER as u64), When::Is(1, 0)]),
    // Not who gets a signal when something comes (F_SETOWN), which could be any process of this user's.
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFD as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFL as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFL as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u64)]),
    when(libc::SYS_ioctl, &[When::Is(1, libc::FIONBIO)]),
    // Is it a terminal?
    when(libc::SYS_ioctl, &[When::Is(1, libc::TCGETS)]),
];

/// Whoever wants a vCPU of the software engine: its process stops. (Linux from 6.12 on sees to it that it is one of ours.)
const STOPS: &[Call] = &[when(libc::SYS_kill, &[When::One(0), When::Is(1, libc::SIGUSR1 as u64)])];

/// New threads.
const THREADS: &[Call] = &[call(libc::SYS_clone3), when(libc::SYS_clone, &[When::Bits(0, THREAD, THREAD)])];
const THREAD: u64 = libc::CLONE_THREAD as u64;

/// A vCPU of KVM: all requests of /dev/kvm's kind.
const KVM: &[Call] = &[when(libc::SYS_ioctl, &[When::Bits(1, 0xff00, 0xae00)])];

/// Every other thread of a machine on KVM: KVM_SIGNAL_MSI, for devices interrupt from wherever their work is done, and
/// KVM_SET_CLOCK and KVM_GET_CLOCK, for whoever lets the machine stand or go on.
const KVM_INTERRUPTS: &[Call] = &[
    when(libc::SYS_ioctl, &[When::Is(1, 0x4020_aea5)]),
    when(libc::SYS_ioctl, &[When::Is(1, 0x4030_ae7b)]),
    when(libc::SYS_ioctl, &[When::Is(1, 0x8030_ae7c)]),
];

/// A vCPU of the software engine: code that it writes, and processes in which the guest's programs run, which have their own
/// filter besides. Their first page comes from memory, never from a path.
const CODE: &[Call] = &[
    call(libc::SYS_mmap),
    call(libc::SYS_mprotect),
    call(libc::SYS_memfd_create),
    call(libc::SYS_ftruncate),
    when(libc::SYS_clone, &[When::Is(0, (libc::CLONE_VM | libc::CLONE_VFORK) as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u64)]),
    call(libc::SYS_dup2),
    call(libc::SYS_close_range),
    call(libc::SYS_setsid),
    call(libc::SYS_ptrace),
    call(libc::SYS_wait4),
    when(libc::SYS_kill, &[When::One(0), When::Is(1, libc::SIGKILL as u64)]),
    when(libc::SYS_kill, &[When::One(0), When::Is(1, libc::SIGUSR1 as u64)]),
    call(libc::SYS_sched_setaffinity),
    when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_SECCOMP as u64)]),
    when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_TSC as u64)]),
    // ARCH_CPUID: whether CPUID raises a signal.
    when(libc::SYS_arch_prctl, &[When::Is(0, 0x1012)]),
    when(libc::SYS_execveat, &[When::Is(0, 0), When::Is(4, libc::AT_EMPTY_PATH as u64)]),
    // The accounts of the own thread.
    call(libc::SYS_openat),
];

/// A file's content.
const DISK: &[Call] = calls! {
    SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_fsync SYS_fdatasync SYS_fallocate SYS_ftruncate SYS_flock
    SYS_sync_file_range SYS_copy_file_range
};

/// Of block devices, and who has locked what.
const DISK_WHEN: &[Call] = &[
    // BLKDISCARD, BLKZEROOUT, BLKGETSIZE64.
    when(libc::SYS_ioctl, &[When::Is(1, 0x1277)]),
    when(libc::SYS_ioctl, &[When::Is(1, 0x127f)]),
    when(libc::SYS_ioctl, &[When::Is(1, 0x8008_1272)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_OFD_SETLK as u64)]),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_OFD_GETLK as u64)]),
];

/// Sockets that are there.
const SOCKETS: &[Call] = calls! {
    SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_shutdown SYS_accept4 SYS_getsockopt SYS_setsockopt
    SYS_getsockname SYS_getpeername SYS_socketpair
};

/// What a tap is told of the guest's card.
const TAP: &[Call] = &[when(libc::SYS_ioctl, &[When::Is(1, libc::TUNSETOFFLOAD)])];

/// New sockets to the network, and where names are told.
const INTERNET: &[Call] = &[
    when(libc::SYS_socket, &[When::Is(0, libc::AF_INET as u64)]),
    when(libc::SYS_socket, &[When::Is(0, libc::AF_INET6 as u64)]),
    call(libc::SYS_connect),
    call(libc::SYS_bind),
    call(libc::SYS_openat),
];

/// New sockets to other processes.
const LOCAL: &[Call] = &[
    when(libc::SYS_socket, &[When::Is(0, libc::AF_UNIX as u64)]),
    call(libc::SYS_connect),
    // What vhost-user gives and takes: memory of ours, event counters and memory of theirs.
    call(libc::SYS_ftruncate),
    call(libc::SYS_memfd_create),
    when(libc::SYS_fcntl, &[When::Is(1, libc::F_ADD_SEALS as u64)]),
];

/// The first thread, besides what all others do: the terminal, and what a guest leaves behind.
const MAIN: &[Call] = &[
    when(libc::SYS_ioctl, &[When::Is(1, libc::TCSETS)]),
    when(libc::SYS_ioctl, &[When::Is(1, libc::TCSETSW)]),
    when(libc::SYS_ioctl, &[When::Is(1, libc::TCSETSF)]),
    when(libc::SYS_ioctl, &[When::Is(1, libc::TIOCGWINSZ)]),
    call(libc::SYS_openat),
    call(libc::SYS_getdents64),
    call(libc::SYS_unlink),
    call(libc::SYS_unlinkat),
    call(libc::SYS_rmdir),
    call(libc::SYS_dup2),
    call(libc::SYS_dup3),
];

/// A thread chooses, for itself, where and how urgently it runs: before it gives up what its kind does not need.
const SCHEDULES: &[Call] = &[
    when(libc::SYS_sched_setaffinity, &[When::Is(0, 0)]),
    when(libc::SYS_sched_setscheduler, &[When::Is(0, 0)]),
    when(libc::SYS_setpriority, &[When::Is(0, libc::PRIO_PROCESS as u64), When::Is(1, 0)]),
];

/// What no guest ever needs: whoever asks for it is not yado any more, and the process ends.
const FORBIDDEN: &[Call] = calls! {
    SYS_execve SYS_fork SYS_vfork
    SYS_process_vm_readv SYS_process_vm_writev SYS_pidfd_open SYS_pidfd_getfd SYS_pidfd_send_signal SYS_kcmp
    SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_move_mount SYS_open_tree SYS_fsopen SYS_fsmount SYS_mount_setattr
    SYS_setns SYS_unshare SYS_open_by_handle_at
    SYS_bpf SYS_perf_event_open SYS_userfaultfd SYS_init_module SYS_finit_module SYS_delete_module SYS_kexec_load
    SYS_kexec_file_load SYS_add_key SYS_request_key SYS_keyctl
    SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setgroups SYS_setfsuid SYS_setfsgid
    SYS_capset SYS_personality SYS_iopl SYS_ioperm SYS_modify_ldt
    SYS_reboot SYS_swapon SYS_swapoff SYS_acct SYS_quotactl SYS_sethostname SYS_setdomainname SYS_settimeofday
    SYS_clock_settime SYS_adjtimex SYS_clock_adjtime SYS_syslog SYS_vhangup
    SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register
};

/// The same, of an engine that has no processes of its own.
const FORBIDDEN_WITHOUT_CODE: &[Call] = calls! { SYS_ptrace SYS_execveat SYS_kill };

/// What a kind of thread may call.
fn of_role(role: Role, plan: &Plan) -> Vec<&'static [Call]> {
    let mut lists = vec![EVERYBODY, EVERYBODY_WHEN];
    if plan.makes_code {
        lists.push(STOPS);
    } else {
        lists.push(KVM_INTERRUPTS);
    }
    let network = |lists: &mut Vec<&'static [Call]>| {
        lists.push(SOCKETS);
        if plan.internet {
            lists.push(INTERNET);
        }
        if plan.local_sockets {
            lists.push(LOCAL);
        }
    };
    match role {
        Role::Vcpu => lists.push(if plan.makes_code { CODE } else { KVM }),
        Role::Disk => {
            lists.extend([DISK, DISK_WHEN]);
            network(&mut lists);
        }
        Role::Network => {
            lists.push(TAP);
            network(&mut lists);
        }
        Role::Timer => {}
        // Its log.
        Role::Port => lists.push(DISK),
        Role::Control => lists.extend([SOCKETS, THREADS]),
    }
    lists
}

/// Numbers of requests, ids and the like are ints: the kernel looks at their lower half only.
fn conditions(when: When) -> Result<Vec<SeccompCondition>, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, Ge, Le, MaskedEq};
    let of = |argument, how, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value);
    Ok(match when {
        When::Is(argument, value) => vec![of(argument, Eq, value)?],
        When::Bits(argument, mask, value) => vec![of(argument, MaskedEq(mask), value)?],
        When::Own(argument) => vec![of(argument, Eq, std::process::id().into())?],
        When::One(argument) => vec![of(argument, Ge, 1)?, of(argument, Le, i32::MAX as u64)?],
    })
}

fn rule(when: &[When]) -> Result<SeccompRule, seccompiler::BackendError> {
    let mut all = Vec::new();
    for &condition in when {
        all.extend(conditions(condition)?);
    }
    SeccompRule::new(all)
}

fn compiled(lists: &[&[Call]], listed: SeccompAction, others: SeccompAction) -> Result<BpfProgram, Error> {
    let wrong = |error: seccompiler::BackendError| Error::Calls(error.to_string());
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for call in lists.iter().copied().flatten() {
        let conditions = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
        match conditions {
            // Allowed whatever its arguments are.
            None => {}
            Some(_) if call.when.is_empty() => *conditions = None,
            Some(conditions) => conditions.push(rule(call.when).map_err(wrong)?),
        }
    }
    let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect();
    let filter = SeccompFilter::new(rules, others, listed, TargetArch::x86_64).map_err(wrong)?;
    BpfProgram::try_from(filter).map_err(wrong)
}

/// The compiled lists of one process.
pub(crate) struct Programs {
    process: [BpfProgram; 3],
    roles: Vec<(Role, BpfProgram)>,
    allowed: usize,
}

impl Programs {
    pub(crate) fn new(plan: &Plan) -> Result<Self, Error> {
        let not_permitted = SeccompAction::Errno(libc::EPERM as u32);
        let mut all = vec![MAIN, THREADS];
        if plan.schedules {
            all.push(SCHEDULES);
        }
        let mut roles = Vec::new();
        for role in Role::ALL {
            let lists = of_role(role, plan);
            roles.push((role, compiled(&lists, SeccompAction::Allow, not_permitted.clone())?));
            all.extend(lists);
        }
        let mut forbidden = vec![FORBIDDEN];
        if !plan.makes_code {
            forbidden.push(FORBIDDEN_WITHOUT_CODE);
        }
        let numbers: std::collections::BTreeSet<_> =
            all.iter().copied().flatten().map(|call| call.number).collect();
        let process = [
            compiled(&all, SeccompAction::Allow, not_permitted)?,
            compiled(&forbidden, SeccompAction::KillProcess, SeccompAction::Allow)?,
            compiled(
                &[&[call(libc::SYS_clone3)]],
                SeccompAction::Errno(libc::ENOSYS as u32),
                SeccompAction::Allow,
            )?,
        ];
        Ok(Self { process, roles, allowed: numbers.len() })
    }

    /// Puts the process's lists on the calling thread.
    pub(crate) fn apply(&self) -> Result<(), Error> {
        for program in &self.process {
            seccompiler::apply_filter(program)
                .map_err(|error| Error::Host { what: "seccomp", source: io::Error::other(error) })?;
        }
        Ok(())
    }

    /// Puts a kind's list on the calling thread.
    pub(crate) fn narrow(&self, role: Role) {
        if let Some((_, program)) = self.roles.iter().find(|(of, _)| *of == role) {
            // The kernel has taken longer programs from this process already; without this one the thread is as confined
            // as the process is.
            let _ = seccompiler::apply_filter(program);
        }
    }

    /// For people.
    pub(crate) fn about(&self) -> String {
        format!("{} for the process, fewer for each kind of thread (seccomp)", self.allowed)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::BTreeSet;

    fn plans() -> Vec<Plan> {
        let plan = |bits: u8| Plan {
            makes_code: bits & 1 != 0,
            internet: bits & 2 != 0,
            local_sockets: bits & 4 != 0,
            schedules: bits & 8 != 0,
            ..Plan::default()
        };
        (0..16).map(plan).collect()
    }

    fn numbers<'a>(lists: impl IntoIterator<Item = &'a &'static [Call]>) -> BTreeSet<i64> {
        lists.into_iter().flat_map(|list| list.iter()).map(|call| call.number).collect()
    }

    #[test]
    fn every_plan_can_be_compiled_and_what_is_forbidden_is_on_no_list() {
        for plan in plans() {
            Programs::new(&plan).unwrap();
            let forbidden = if plan.makes_code {
                numbers(&[FORBIDDEN])
            } else {
                numbers(&[FORBIDDEN, FORBIDDEN_WITHOUT_CODE])
            };
            let mut lists = vec![MAIN, THREADS, SCHEDULES];
            lists.extend(Role::ALL.into_iter().flat_map(|role| of_role(role, &plan)));
            let both: Vec<_> = numbers(&lists).intersection(&forbidden).copied().collect();
            assert!(both.is_empty(), "{plan:?}: {both:?}");
        }
    }

    #[test]
    fn on_kvm_everybody_interrupts_and_only_vcpus_do_more_with_it() {
        let may = |role, plan: &Plan, request: u64| {
            of_role(role, plan).into_iter().flatten().any(|call| {
                let fits = |when: &When| match *when {
                    When::Is(1, value) => request == value,
                    When::Bits(1, mask, value) => request & mask == value,
                    _ => false,
                };
                call.number == libc::SYS_ioctl && call.when.iter().all(fits)
            })
        };
        // KVM_SIGNAL_MSI, KVM_SET_CLOCK, KVM_GET_CLOCK; KVM_RUN, KVM_CREATE_VM, KVM_SET_USER_MEMORY_REGION.
        let (of_all, of_vcpus) = ([0x4020_aea5, 0x4030_ae7b, 0x8030_ae7c], [0xae80, 0xae01, 0x4020_ae46]);
        for plan in plans() {
            for role in Role::ALL {
                let all = of_all.iter().all(|&request| may(role, &plan, request));
                assert_eq!(all, !plan.makes_code, "{role:?} {plan:?}");
                let some = of_vcpus.iter().any(|&request| may(role, &plan, request));
                assert_eq!(some, role == Role::Vcpu && !plan.makes_code, "{role:?} {plan:?}");
            }
        }
    }

    #[test]
    fn only_those_who_need_it_make_sockets_processes_and_code() {
        let may = |role, plan: &Plan, number: i64| {
            of_role(role, plan).into_iter().flatten().any(|call| call.number == number)
        };
        for plan in plans() {
            for role in Role::ALL {
                let carries = matches!(role, Role::Disk | Role::Network);
                let reach = plan.internet || plan.local_sockets;
                assert_eq!(may(role, &plan, libc::SYS_connect), carries && reach, "{role:?} {plan:?}");
                let runs = role == Role::Vcpu && plan.makes_code;
                assert_eq!(may(role, &plan, libc::SYS_ptrace), runs, "{role:?} {plan:?}");
                assert_eq!(may(role, &plan, libc::SYS_clone3), role == Role::Control, "{role:?}");
                assert!(!may(role, &plan, libc::SYS_unlinkat), "{role:?}");
            }
        }
    }
}
