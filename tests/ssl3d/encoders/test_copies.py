"""Copies of an encoder's weights: a teacher that follows, and parameters that are put back."""

import torch
from torch import nn

from ssl3d.encoders.copies import flat_parameters, follow, momentum_teacher, restore_parameters


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Conv3d(2, 2, 1))


def test_a_teacher_evaluates_and_learns_from_its_student_alone():
    student = small()
    teacher = momentum_teacher(student)
    assert not teacher.training and student.training
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student(torch.rand(2, 1, 4, 4, 4))  # statistics and the counter of batches move
    with torch.no_grad():
        student[0].weight.add_(1)
    follow(teacher, student, momentum=0.9)
    for name, new in student.state_dict().items():
        moved = new if name.endswith("num_batches_tracked") else 0.9 * before[name] + 0.1 * new
        assert torch.allclose(teacher.state_dict()[name].double(), moved.double(), atol=1e-6), name


def test_parameters_are_put_back_whatever_their_layout():
    module = small()
    module[0].weight.data = module[0].weight.data.contiguous(memory_format=torch.channels_last_3d)
    kept = flat_parameters(module)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2).add_(1)
    assert len(kept) == sum(p.numel() for p in module.parameters())
    restore_parameters(module, kept)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
